"""Capabilities that backends lack, with the reasons, and the tests that are skipped for them.

A test with the mark ``needs`` names the capability itself. Other tests are listed here, by the end of their node id,
with or without parameters, or by their file; names of whole files end in ``.py``.
"""

from __future__ import annotations

# Missing capabilities of each backend, with the reason. Tests marked ``needs(capability)`` are skipped there. With
# ``only``, the mark applies to parameters whose id contains that text.
MISSING: dict[str, dict[str, str]] = {
    "posix": {
        "affinity": "not every system lets a process choose its cores: cpu_ids raises UnsupportedError",
        "ends_in_select": "recv and poll notice that the other end is gone; waiting for several connections does not",
        "exact_objects": "an object has whole pages, and one more that says what it is",
        "foreign_channels": "memory crosses foreign channels by way of /proc: it raises UnsupportedError",
        "labels": "memory of shm_open(3) without a name has no label, so /proc does not tell that it is forkshm's",
        "locks_as_leases": "a lease is a pipe, so each array on its way takes an fd of its sender",
        "memfd": "memory without a name is made by shm_open(3), so it has the bounds of memory with one",
        "pagemap": "which pages were written is not told, so copies that are handed on are copied again",
        "parent_death_signal": "a thread of each worker waits for the parent's end; in a stopped one it cannot run",
        "populate": "no call makes a mapping take all its memory now (MADV_POPULATE_WRITE is Linux')",
        "punch_holes": "pages of shared memory cannot be given back one by one: an arena keeps what it once needed",
        "seals": "no kernel but Linux can forbid writing to memory forever: seal() raises UnsupportedError",
    },
    "windows": {
        "seals": "sections cannot be sealed: seal() raises UnsupportedError",
    },
}

# Whole files, doctests, and tests without a mark. For each backend: the missing capability, the reason, and the tests
# to skip.
SKIPS: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "posix": {
        "linux": ("about the calls of the Linux backend itself", ("backend/test_linux.py",)),
        "seals": (
            "no kernel but Linux can forbid writing to memory forever: seal() raises UnsupportedError",
            (
                "forkshm/region/_mapped.py::forkshm.region._mapped.MappedRegion.seal",
                "region/test_seal.py",
            ),
        ),
        "proc": (
            "memory crosses foreign channels by way of /proc: it raises UnsupportedError",
            (
                "forkshm/descriptor/_region.py",
                "descriptor/test_region.py",
                "descriptor/test_fuzz.py",
                "pickler/test_foreign.py",
            ),
        ),
    },
    # Features that are missing entirely (fork, /proc, fds) are in windows/_capabilities.py; tests skip when they use
    # one.
    "windows": {
        "linux": ("about the calls of the Linux backend itself", ("backend/test_linux.py",)),
        "suites": (
            "the CPython that is had for Windows comes without the package test, which the suites of others need",
            ("upstream/test_upstream.py",),
        ),
        "times": ("what Wine takes says nothing of Windows, and the benchmarks are for Linux", ("test_benchmarks.py",)),
        "commands": (
            "python -m forkshm ls, top and clean look into /proc, and run forks: each says in a line that it cannot",
            (
                "test_commands.py::test_ls_names_creator_holders_size_and_resident_bytes",
                "test_commands.py::test_ls_sees_memory_that_is_only_mapped",
                "test_commands.py::test_ls_shows_the_warm_memory_of_pools_and_a_creator_that_ended",
                "test_commands.py::test_top_lists_as_often_as_requested",
                "test_commands.py::test_clean_shows_asks_and_removes",
                "test_commands.py::test_clean_keeps_used_young_and_other_objects",
                "test_commands.py::test_clean_looks_again_after_the_answer",
                "test_commands.py::test_clean_keeps_objects_of_other_users",
                "test_examples.py::test_the_worker_script_counts_the_same_in_several_workers",
            ),
        ),
        "posix": ("about the calls of the POSIX backend itself", ("backend/test_posix.py",)),
        "windows_sections_missing": (
            "about WindowsSharedMemory where there is none; windows/test_windows.py is about it where it works",
            ("region/test_windows.py",),
        ),
        "seals": (
            "sections cannot be sealed: seal() raises UnsupportedError",
            ("region/test_seal.py",),
        ),
        "pagemap": (
            "which pages were written is not told, so copies that are handed on are copied again",
            (
                (
                    "pickler/test_objects.py::"
                    "test_a_copy_on_write_region_in_which_nothing_was_written_crosses_as_a_descriptor"
                ),
                "pickler/test_objects.py::test_the_written_pages_of_a_copy_on_write_region_are_copied",
                "integrations/test_born_shared.py",
                "pool/test_handing_on.py::test_a_slice_of_a_received_array_is_sent_on_without_a_copy",
                "pool/test_handing_on.py::test_an_array_that_is_returned_is_copied_once_only",
                "pool/test_handing_on.py::test_closures_and_arrays_with_many_receivers_are_sent_on",
                "pool/test_handing_on.py::test_echo_of_many_containers",
                "pool/test_handing_on.py::test_the_memory_comes_back_when_the_last_has_let_go",
                "pool/test_handing_on.py::test_pages_that_could_not_be_mapped_back_are_mapped_before_the_next_use",
                "test_statistics.py::test_arrays_sent_on_are_not_copied_again",
                "test_statistics.py::test_blocks_are_live_while_held",
            ),
        ),
        "cut_files": (
            "a file that is mapped can neither be made shorter nor deleted there",
            (
                "descriptor/test_region.py::test_a_file_that_was_cut_since_is_noticed",
                "region/test_file.py::test_remove_returns_whether_it_removed_and_regions_stay",
                "region/test_mapped_region.py::TestLifetime::test_a_region_outlives_the_name[file mapping]",
            ),
        ),
        "fd_limit": (
            "the number of handles has no limit that a program comes to",
            (
                "pickler/test_objects.py::test_fds_that_did_not_arrive_are_said_with_the_remedy",
                "channel/test_queue.py::TestOurs::test_thousands_of_arrays_wait_whatever_the_limit_on_files",
                "test_commands.py::test_the_doctor_marks_missing_features",
            ),
        ),
        "carving": (
            "a block of an arena is a section of its own, and an exclusive one cannot be remapped in one step",
            (
                "region/blocks/test_arena.py::test_a_block_knows_its_previously_used_bytes",
                "region/blocks/test_arena.py::test_a_block_that_is_held_comes_back_when_its_claim_has_ended",
                "region/blocks/test_arena.py::test_only_an_exclusive_held_block_becomes_private_when_shared_out",
                "region/blocks/test_arena.py::test_a_segment_holds_no_more_blocks_than_locks_are_cheap_for",
                "region/blocks/test_arena.py::test_the_lowest_free_address_is_used_again_first",
                "region/blocks/test_segment.py::test_a_claim_of_an_invalid_block_is_refused_and_closes_the_lease",
                "region/blocks/test_segment.py::test_a_block_is_not_used_again_while_its_lease_is_open",
                "region/blocks/test_segment.py::test_a_claim_without_a_lease_is_refused_and_closes_the_fd",
            ),
        ),
        "exact_objects": (
            "behind its last page a section has one more that says what it is, so no two regions touch",
            ("region/pointers/test_offset_ptr.py::test_the_start_of_the_next_region_is_not_the_end_of_this_one",),
        ),
        "parts_of_views": (
            "a view is unmapped as a whole: the pages that a region gave up are free when the rest of it is",
            ("region/test_mapped_region.py::TestShrink::test_pages_that_were_given_up_can_be_mapped_again",),
        ),
        "symbolic_links": (
            "Wine does not find what a link made by Python points to",
            (
                "region/test_file.py::test_a_symbolic_link_is_followed",
                "region/test_object.py::test_a_symbolic_link_is_refused_and_its_target_is_unchanged",
            ),
        ),
        "fork": (
            "the test is about a forked child, and holds something when it comes to that",
            (
                "region/blocks/test_arena.py::test_a_forked_child_does_not_hold_its_parents_parked_leases",
                "region/blocks/test_segment.py::test_a_child_does_not_hold_leases_that_are_about_to_be_sent",
                "region/test_object.py::test_no_resource_tracker_is_started_and_no_leak_is_reported",
                "region/test_object.py::test_a_thousand_killed_processes_leave_only_named_objects",
                "region/test_object.py::test_a_child_of_a_pool_does_not_remove",
                "test_leaks.py::test_inherited_objects_are_not_reported_by_a_child",
                "test_examples.py::test_example_runs[anonymous_memory.py]",
                "test_examples.py::test_example_runs[robust_mutex.py]",
                "test_examples.py::test_example_runs[shared_containers.py]",
                "test_examples.py::test_example_runs[supervise.py]",
                "test_examples.py::test_example_runs[team.py]",
                "test_examples.py::test_example_runs[worker_script.py]",
            ),
        ),
        # -- processes: tests of channel, pool, executor, spmd, failure and the layers above them --
        "inheritance": (
            "the test is about what a forked child finds of its parent's, which a new process has not",
            (
                "executor/test_executor.py::test_a_forked_child_is_told",
                "decorator/test_parallel.py::test_functions_of_the_script_see_the_globals_that_an_initializer_set",
                "dropin/test_snippets.py::test_a_snippet_runs_with_forkshm[a remote manager]",
                "dropin/test_snippets.py::test_a_snippet_runs_with_forkshm[logging]",
                "failure/test_fork_honestly.py::test_a_pool_forks_without_threads",
                "failure/test_fork_honestly.py::test_processes_queues_and_managers_are_made_without_threads",
                "failure/test_fork_honestly.py::test_a_thread_that_holds_a_lock_is_why_forkserver_is_one_argument_away",
                "failure/test_forked_by_others.py",
                "failure/test_killed.py::test_a_child_that_ends_normally_does_not_end_its_parents_pool",
                "failure/test_killed.py::test_a_pool_in_a_forked_child_says_that_it_is_the_parents",
                "failure/test_bounded.py::test_workers_that_die_whenever_they_take_a_task_end_the_pool",
                "failure/test_bounded.py::test_nonsense_in_place_of_an_answer_fails_that_task",
                "failure/test_queues_killed.py::test_room_that_a_killed_receiver_had_not_given_back_is_found",
                "failure/test_killed.py::test_a_worker_dies_before_naming_its_task",
                "failure/test_killed.py::test_a_worker_dies_after_its_answer_but_before_recording_it",
                "failure/test_killed.py::test_a_sibling_that_the_parent_forked_does_not_keep_the_workers_alive",
                "pool/test_handing_on.py::test_a_forked_child_does_not_see_writes_to_a_copy",
                "pool/test_regions_cross.py::test_a_region_made_before_the_pool_is_the_one_the_workers_inherited",
                "executor/test_executor.py::test_results_in_a_forked_child_are_refused",
                "channel/test_queue.py::TestOurs::test_a_child_does_not_send_its_parents_backlog_again",
                "channel/test_queue.py::TestOurs::test_a_forked_child_drops_its_parents_unsent_items",
                "channel/test_handles.py::test_a_child_keeps_no_handle_of_its_parents_messages",
                "channel/test_endpoint.py::test_ends_of_one_process_only_are_closed_in_its_children",
            ),
        ),
        "workers that meet": (
            "teams and supervised workers are forked, launched ones need memory that grows: all raise UnsupportedError",
            ("spmd/test_launch.py", "spmd/test_run.py", "spmd/test_supervise.py", "spmd/test_team.py"),
        ),
        "signals": (
            "needs handlers of signals from other processes, or signals to oneself",
            (
                "failure/test_crash_table.py::test_the_exit_of_an_idle_worker_affects_no_task",
                "pool/test_task_timeout.py::test_a_task_that_stops_its_worker_fails",
                "failure/test_crash_table.py::test_a_worker_stopped_forever_fails_its_task_in_time",
                "failure/test_crash_table.py::test_a_worker_stopped_in_the_initializer_is_replaced",
                "failure/test_parents_die.py::test_a_parent_that_is_stopped_goes_on_or_takes_its_workers_along",
            ),
        ),
        "memory limits": (
            "needs limits on the memory of a process or a group (setrlimit(2), cgroups(7)): Windows has none",
            (
                "failure/test_crash_table.py::test_out_of_memory_is_an_exception_or_a_death_of_that_task_only",
                "limits/test_memory.py::test_everything_works_whatever_dev_shm_is",
                "limits/test_memory.py::test_memory_with_a_name_says_that_dev_shm_has_no_room",
                "limits/test_memory.py::test_a_limit_on_address_space_raises_and_smaller_requests_work",
                "limits/test_memory.py::test_a_worker_without_address_space_says_so_and_the_pool_goes_on",
                "limits/test_memory.py::test_ten_thousand_regions_live_at_once",
                "limits/test_oom.py::test_a_worker_that_the_kernel_kills_for_memory_fails_its_task_with_the_evidence",
                "limits/test_oom.py::test_a_parent_that_the_kernel_kills_for_memory_takes_its_workers_along",
                "limits/test_oom.py::test_to_populate_more_than_a_group_has_left_is_an_exception",
                "limits/test_oom.py::test_the_doctor_shows_the_memory_left_in_a_group",
                "limits/test_oom.py::test_populate_beyond_the_memory_of_a_group_is_refused",
            ),
        ),
        "file limits": (
            "needs a limit on the open files of a process (setrlimit(2))",
            (
                "limits/test_fds.py::test_1000_shared_arrays_cross_when_the_soft_limit_is_256",
                "limits/test_fds.py::test_1000_arrays_of_one_region_cross_when_the_hard_limit_is_256",
                "limits/test_fds.py::test_regions_beyond_a_hard_limit_raise_with_their_number_and_advice",
                "limits/test_fds.py::test_a_worker_that_cannot_hold_all_says_so_and_the_pool_goes_on",
                "limits/test_fds.py::test_a_thousand_tasks_that_each_copy_are_no_matter",
                "limits/test_fds.py::test_1000_shared_arrays_cross_when_the_hard_limit_is_256",
                "limits/test_fds.py::test_regions_of_the_commons_are_apart_in_parent_and_child_and_cannot_be_sealed",
            ),
        ),
        "memory maps": (
            "what memory a process holds is read from /proc",
            ("pool/test_memory.py::test_memory_stays_the_same_over_many_messages",),
        ),
        "queue sizes": (
            "the size of a pipe is settled when it is made",
            (
                "limits/test_messages.py::test_a_message_larger_than_the_queue_enlarges_the_queue",
                "limits/test_messages.py::test_a_queue_that_may_not_be_larger_says_so",
            ),
        ),
        "interrupts": (
            "Ctrl-C is a console's there, and cannot be sent to a process",
            (
                "failure/test_interrupts.py::test_an_event_loop_gets_the_interrupt_once",
                "failure/test_interrupts.py::test_where_python_has_no_handler_there_is_none_afterwards",
                "failure/test_interrupts.py::test_a_process_that_another_thread_starts_meanwhile_has_the_handler_of_the_program",
                "failure/test_interrupts.py::test_an_interrupt_in_fork_hooks_is_not_lost",
                "failure/test_interrupts.py::test_while_workers_are_starting",
                "failure/test_interrupts.py::test_while_a_closed_pool_is_joined",
                "failure/test_interrupts.py::test_while_workers_of_a_closed_pool_are_leaving",
                "failure/test_bounded.py::test_ctrl_c_ends_a_map_at_once_with_one_traceback",
                "failure/test_killed.py::test_ctrl_c_ends_a_map_and_leaves_no_process",
            ),
        ),
        "library tests": (
            "that Python comes without the tests of its library",
            ("executor/test_standard_executor_tests.py::test_the_standard_librarys_tests_pass",),
        ),
        "start methods": (
            "the program uses fork and forkserver beside spawn",
            ("dropin/test_snippets.py::test_a_snippet_runs_with_forkshm[a context is asked for]",),
        ),
        "children": (
            "whoever waits for a child does not take its exit code away from others there",
            (
                "failure/test_bounded.py::test_a_worker_that_cannot_be_killed_is_left_behind",
                "failure/test_killed.py::test_exit_codes_that_others_collect_do_not_confuse_the_pool",
            ),
        ),
        "handles_in_messages": (
            "a pipe carries no handles: what a process has sent lasts until its end, and ten seconds of that",
            ("channel/test_queue.py::TestOurs::test_items_survive_the_end_of_the_sender_whatever_they_are",),
        ),
        # -- end of processes --
        "fork context": (
            "about several start methods: Windows has spawn alone",
            (
                "processes/test_start_methods.py::test_a_context_is_one_for_both_libraries",
                "processes/test_start_methods.py::test_fork_is_the_default_and_comes_first",
                "processes/test_start_methods.py::test_the_start_method_is_set_once",
                "processes/test_start_methods.py::test_a_process_receives_its_arguments",
            ),
        ),
        "library_files": (
            "the library of that Python is in a zip, and the example reads its files",
            (
                "test_examples.py::test_example_runs[decorator.py]",
                "test_examples.py::test_example_runs[executor_asyncio.py]",
            ),
        ),
        "proc": (
            "looks into /proc in a program of its own: Windows has none",
            ("test_public_api.py::test_importing_forkshm_starts_nothing",),
        ),
        "shm_open": (
            "memory with a name is a file there; the standard library's is a section, as WindowsSharedMemory",
            (
                "region/test_object.py::test_a_full_dev_shm_is_an_error_when_the_size_is_set_and_never_a_sigbus",
                "region/test_object.py::test_the_standard_library_opens_ours",
                "region/test_object.py::test_we_open_that_of_the_standard_library",
                "region/test_object.py::test_both_in_one_program_see_each_other_and_either_can_remove",
            ),
        ),
        "unix_sockets": ("Python has no AF_UNIX there", ("region/test_object.py::test_a_socket_is_refused",)),
        "many_handles": (
            "a message names 8,192 handles at the most",
            ("channel/test_endpoint.py::test_fds_in_an_unread_message_are_closed_with_the_channel",),
        ),
        "fds_of_files": (
            "a file of Python has a number of the C library's, and the test takes it for the kernel's",
            (
                "region/test_mapped_region.py::TestFlush::test_flushed_bytes_are_on_disk_for_direct_reads",
                "channel/test_message.py::test_fds_that_are_no_memory_are_refused_and_closed",
            ),
        ),
        "advice": (
            "of Boost's advice Windows takes willneed only",
            ("region/test_mapped_region.py::TestAdvise::test_linux_takes_the_advice_of_boost",),
        ),
        "fd_numbers": (
            "a handle cannot be given the number of another one",
            ("descriptor/test_region.py::test_an_fd_that_is_another_object_now_is_noticed",),
        ),
    },
}


def reason_to_skip(backend: str, nodeid: str) -> str | None:
    """Return the reason to skip a test on a backend, or None."""
    whole = nodeid.removeprefix("tests/")
    name = whole.partition("[")[0]
    for capability, (why, tests) in SKIPS.get(backend, {}).items():
        for test in tests:
            if test in (name, whole) or (test.endswith(".py") and name.partition("::")[0] == test):
                return f"needs {capability}: {why}"
    return None


def why_missing(backend: str, capability: str, only: str, nodeid: str) -> str | None:
    """Return the reason to skip a test with such a mark on a backend, or None."""
    why = MISSING.get(backend, {}).get(capability)
    if why is None or only not in nodeid.partition("[")[2]:
        return None
    return f"needs {capability}: {why}"
