"""
scikit-learn by one line
========================

``import forkshm.joblib`` registers a backend, and one line selects it. The search below runs in forkshm's workers;
the data are copied once for all of them.
"""

import joblib
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC

import forkshm.joblib

joblib.parallel_config("forkshm", n_jobs=2)

# %%
# Everything else is ordinary scikit-learn.

data, target = load_digits(return_X_y=True)
grid = {"C": [0.1, 1, 10], "gamma": [1e-4, 1e-3, 1e-2]}
search = GridSearchCV(SVC(), grid, cv=3).fit(data[:600], target[:600])
print(search.best_params_)

scores = search.cv_results_["mean_test_score"].reshape(3, 3)
fig, axis = plt.subplots(figsize=(5, 4), layout="constrained")
image = axis.imshow(scores, vmin=0, vmax=1)
axis.set_xticks(range(3), grid["gamma"])
axis.set_yticks(range(3), grid["C"])
axis.set(xlabel="gamma", ylabel="C", title="accuracy")
for (row, column), score in np.ndenumerate(scores):
    axis.text(column, row, f"{score:.2f}", ha="center", va="center", color="white" if score < 0.6 else "black")
fig.colorbar(image)
plt.show()

# %%
# End the workers that the backend keeps for the next call.

joblib.parallel_config("loky")
forkshm.joblib.shutdown()
