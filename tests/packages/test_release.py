"""The script `release`, in a repository of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INIT = Path("forkshm/__init__.py")

pytestmark = pytest.mark.skipif(
    not (ROOT / "release").exists() or None in map(shutil.which, ("bash", "git", "awk", "sed")),
    reason="needs the source tree, bash, git, awk and sed",
)


class Repository:
    def __init__(self, path):
        self.path = path
        (path / "forkshm").mkdir()
        (path / INIT).write_text('"""A package."""\n\n__version__ = "0.2.0"\n')
        (path / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n\n### Added\n\n- A thing.\n")
        (path / "CITATION.cff").write_text("version: 0.2.0\n")
        shutil.copy(ROOT / "release", path / "release")
        self.git("init", "--quiet")
        self.git("add", ".")
        self.git("commit", "--quiet", "-m", "Begin")

    def run(self, *command, packages="true"):
        identity = {f"GIT_{role}_{what}": "a@b.c" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        environment = {**os.environ, **identity, "FORKSHM_PACKAGES": packages, "GIT_CONFIG_GLOBAL": os.devnull}
        return subprocess.run(command, cwd=self.path, env=environment, capture_output=True, text=True, timeout=60)

    def git(self, *command):
        done = self.run("git", *command)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def release(self, *command, packages="true"):
        return self.run("bash", "release", *command, packages=packages)

    def refuses(self, *command, because, packages="true"):
        before = self.git("rev-parse", "HEAD"), self.git("status", "--porcelain")
        done = self.release(*command, packages=packages)
        assert done.returncode == 1
        assert because in done.stderr
        assert (self.git("rev-parse", "HEAD"), self.git("status", "--porcelain")) == before


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path)


def test_a_release_from_start_to_end(repository):
    assert repository.release("prepare", "0.3.0").returncode == 0
    assert '__version__ = "0.3.0"' in (repository.path / INIT).read_text()
    assert (repository.path / "CITATION.cff").read_text() == "version: 0.3.0\n"
    assert "## Unreleased" not in (repository.path / "CHANGELOG.md").read_text()
    assert repository.git("log", "-1", "--format=%s") == "Release 0.3.0\n"
    assert repository.release("notes").stdout == "### Added\n\n- A thing.\n"

    assert "git push origin v0.3.0" in repository.release("tag").stdout
    assert repository.git("tag", "--points-at", "HEAD") == "v0.3.0\n"

    assert repository.release("next", "0.4.0").returncode == 0
    assert '__version__ = "0.4.0.dev0"' in (repository.path / INIT).read_text()
    changelog = (repository.path / "CHANGELOG.md").read_text()
    assert changelog.startswith("# Changelog\n\n## Unreleased\n\n## 0.3.0 - ")
    assert repository.release("notes", "0.3.0").stdout == "### Added\n\n- A thing.\n"
    assert repository.git("status", "--porcelain") == ""


def test_the_version_may_be_set_already(repository):
    assert repository.release("prepare", "0.2.0").returncode == 0
    assert repository.git("log", "-1", "--format=%s") == "Release 0.2.0\n"


def test_packages_that_fail_change_nothing(repository):
    repository.refuses("prepare", "0.3.0", packages="false", because="the packages are not in order")


def test_states_that_cannot_be_released_are_refused(repository):
    repository.refuses("prepare", "next", because="'next' is not a version like 1.2.3")
    repository.refuses("tag", because="the last commit is not 'Release 0.2.0'")
    repository.refuses("next", "0.3.0", because="has a section 'Unreleased'")
    (repository.path / INIT).write_text("changed\n")
    repository.refuses("prepare", "0.3.0", because="there are uncommitted changes")
    repository.git("checkout", "--quiet", ".")
    repository.git("tag", "v0.3.0")
    repository.refuses("prepare", "0.3.0", because="the tag v0.3.0 exists")
    (repository.path / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n")
    repository.git("commit", "--quiet", "-am", "Empty")
    repository.refuses("prepare", "0.4.0", because="nothing under 'Unreleased'")


def test_without_a_command_the_steps_are_listed(repository):
    done = repository.release()
    assert done.returncode == 2
    assert "./release prepare X.Y.Z" in done.stdout
