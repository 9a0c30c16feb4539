"""What a backend cannot offer, and the tests that are about it: by name, and each with its reason.

A test is named by the end of its node id, without parameters or with them, or by its file; whole files end in ``.py``.
"""

from __future__ import annotations

#: Of each backend: the capability that is missing, why, and what is left out for want of it.
SKIPS: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "posix": {
        "linux": ("about the calls of the Linux backend itself", ("backend/test_linux.py",)),
        "seals": (
            "no kernel but Linux can forbid writing to memory for ever: seal() raises UnsupportedError",
            (
                "forkshm/region/_mapped.py::forkshm.region._mapped.MappedRegion.seal",
                "region/test_seal.py",
                "region/test_anonymous.py::test_the_memory_cannot_be_shrunk_under_the_feet_of_its_readers",
                "pickler/test_aliases.py::test_read_write_of_a_sealed_region_is_refused",
                "pool/test_read_only.py::test_a_sealed_region_and_its_way_out",
                "pool/test_regions_cross.py::test_a_sealed_region_arrives_read_only_and_the_creator_goes_on",
            ),
        ),
        "proc": (
            "memory crosses the channels of others by way of /proc: it raises UnsupportedError, and names ours",
            (
                "forkshm/descriptor/_region.py",
                "descriptor/test_region.py",
                "descriptor/test_fuzz.py",
                "pickler/test_foreign.py",
                "doors/test_containers.py::test_through_the_standard_library_it_is_the_same_memory",
                "region/test_file.py::test_a_file_that_one_may_only_read_is_reached_by_its_descriptor",
                (
                    "failure/test_forked_by_others.py::"
                    "test_a_pool_of_the_standard_library_sees_what_it_inherits_and_disturbs_nobody"
                ),
                "failure/test_forked_by_others.py::test_an_executor_forks_from_its_own_thread_while_ours_work",
            ),
        ),
        "pagemap": (
            "which pages were written is not told, so copies that are handed on are copied again",
            (
                (
                    "pickler/test_objects.py::"
                    "test_a_copy_on_write_region_in_which_nothing_was_written_crosses_as_a_descriptor"
                ),
                "pickler/test_objects.py::test_of_a_copy_on_write_region_the_pages_that_were_written_are_copied",
                "integrations/test_born_shared.py::test_for_reading_means_no_writes_there_and_ours_are_seen",
                "pool/test_handing_on.py::test_a_slice_of_what_arrived_is_handed_on_too",
                "pool/test_handing_on.py::test_the_memory_comes_back_when_the_last_has_let_go",
            ),
        ),
        "punch_holes": (
            "pages of shared memory cannot be given back one by one: an arena keeps what it once needed",
            (
                "region/test_arena.py::test_trim_gives_memory_back_but_not_that_of_blocks_in_use",
                "region/test_arena.py::test_trim_keeps_as_much_warm_as_it_is_told",
                "region/test_arena.py::test_memory_beyond_the_recent_demand_goes_back_by_itself",
                "region/test_arena.py::test_there_is_excess_only_beyond_what_is_kept_warm",
                "pool/test_memory.py::test_memory_is_used_again_and_given_back",
            ),
        ),
        "populate": (
            "no call makes a mapping take all its memory now (MADV_POPULATE_WRITE is Linux')",
            (
                "region/test_mapped_region.py::TestPopulate::test_an_anonymous_region_is_populated",
                "region/test_mapped_region.py::TestPopulate::test_in_every_mode_and_no_byte_changes",
                "region/test_mapped_region.py::TestPopulate::test_populate_takes_all_the_memory_now",
                "region/test_mapped_region.py::TestPopulate::test_what_was_opened_for_reading_can_be_populated",
            ),
        ),
        "exact_objects": (
            "an object has whole pages, and one more that says what it is",
            ("region/test_arena.py::test_an_untouched_arena_takes_no_memory",),
        ),
        "memfd": (
            "memory without a name is made by shm_open(3), so it has the bounds of memory with one",
            ("region/test_object.py::test_a_full_dev_shm_is_an_error_when_the_size_is_set_and_never_a_sigbus",),
        ),
        "locks_as_leases": (
            "a lease is a pipe, so each array on its way takes an fd of its sender",
            ("channel/test_queue.py::TestOurs::test_thousands_of_arrays_wait_whatever_the_limit_on_files",),
        ),
    },
    # What is not there at all (fork, /proc, fds): windows/_capabilities.py. A test is left out where it comes to that.
    "windows": {
        "linux": ("about the calls of the Linux backend itself", ("backend/test_linux.py",)),
        "times": ("what Wine takes says nothing of Windows, and the benchmarks are for Linux", ("test_benchmarks.py",)),
        "commands": (
            "python -m forkshm looks into /proc and forks: it says that it cannot",
            (
                "test_commands.py",
                "test_examples.py::test_the_worker_script_counts_the_same_in_several_workers",
                "test_readme.py::test_the_script_runs_in_several_workers",
            ),
        ),
        "born_shared": (
            "NumPy's hook for its memory is machine code for the calling convention of POSIX",
            ("test_readme.py::test_arrays_are_born_shared_as_it_says",),
        ),
        "posix": ("about the calls of the POSIX backend itself", ("backend/test_posix.py",)),
        "windows_sections_missing": (
            "about WindowsSharedMemory where there is none; windows/test_windows.py is about it where it works",
            ("region/test_windows.py",),
        ),
        "seals": (
            "sections cannot be sealed: seal() raises UnsupportedError",
            (
                "region/test_seal.py",
                "region/test_anonymous.py::test_the_memory_cannot_be_shrunk_under_the_feet_of_its_readers",
                "pickler/test_aliases.py::test_read_write_of_a_sealed_region_is_refused",
                "pool/test_read_only.py::test_a_sealed_region_and_its_way_out",
                "pool/test_regions_cross.py::test_a_sealed_region_arrives_read_only_and_the_creator_goes_on",
            ),
        ),
        "pagemap": (
            "which pages were written is not told, so copies that are handed on are copied again",
            (
                (
                    "pickler/test_objects.py::"
                    "test_a_copy_on_write_region_in_which_nothing_was_written_crosses_as_a_descriptor"
                ),
                "pickler/test_objects.py::test_of_a_copy_on_write_region_the_pages_that_were_written_are_copied",
                "integrations/test_born_shared.py",
                "pool/test_handing_on.py",
                "test_statistics.py::test_what_is_handed_on_is_not_copied_again",
                "test_statistics.py::test_blocks_are_live_while_somebody_has_them",
            ),
        ),
        "cut_files": (
            "a file that is mapped can neither be made shorter nor deleted there",
            (
                "descriptor/test_region.py::test_a_file_that_was_cut_since_is_noticed",
                "region/test_file.py::test_remove_says_whether_it_did_and_regions_stay",
                "region/test_mapped_region.py::TestLifetime::test_a_region_outlives_the_name[file mapping]",
            ),
        ),
        "fd_limit": (
            "the number of handles has no limit that a program comes to",
            ("pickler/test_objects.py::test_fds_that_did_not_arrive_are_said_with_the_remedy",),
        ),
        "carving": (
            "a block of an arena is a section of its own, and an exclusive one cannot be mapped anew in one step",
            (
                "region/test_arena.py::test_a_block_knows_how_much_of_it_was_used_before",
                "region/test_arena.py::test_a_block_that_is_held_comes_back_when_its_claim_has_ended",
                "region/test_arena.py::test_a_held_block_is_parted_when_it_is_shared_out_and_exclusive_only",
                "region/test_arena.py::test_a_segment_holds_no_more_blocks_than_locks_are_cheap_for",
                "region/test_arena.py::test_the_lowest_free_address_is_used_again_first",
                "region/test_segment.py::test_a_claim_of_what_is_no_block_is_refused_and_closes_the_lease",
                "region/test_segment.py::test_a_block_is_not_used_again_while_its_lease_is_open",
                "region/test_segment.py::test_a_claim_with_something_else_than_a_lease_is_refused_and_closes_it",
            ),
        ),
        "exact_objects": (
            "behind its last page a section has one more that says what it is, so no two regions touch",
            ("region/test_offset_ptr.py::test_the_start_of_the_next_region_is_not_the_end_of_this_one",),
        ),
        "sparse_files": (
            "memory with a name has all its room at once, so an object of 4 GiB takes as much of the disk",
            ("region/test_mapped_region.py::TestPart::test_bytes_beyond_4_gib[named object]",),
        ),
        "parts_of_views": (
            "a view is unmapped as a whole: the pages that a region gave up are free when the rest of it is",
            ("region/test_mapped_region.py::TestShrink::test_pages_that_were_given_up_can_be_mapped_again",),
        ),
        "symbolic_links": (
            "Wine does not find what a link made by Python points to",
            (
                "region/test_file.py::test_a_symbolic_link_is_followed",
                "region/test_object.py::test_a_symbolic_link_is_refused_and_what_it_names_is_left_alone",
            ),
        ),
        "texts": (
            "an int of C is a long there, and a page is 64 KiB: what is to be read has other numbers and names",
            (
                "channel/test_endpoint.py::test_a_bad_fd_is_not_mistaken_for_a_closed_end",
                "region/test_place.py::test_an_offset_has_to_be_aligned",
                "region/test_arena.py::test_a_refused_segment_leaves_the_arena_usable",
                "region/test_place.py::test_it_has_to_fit",
                "region/test_place.py::test_what_means_something_in_one_process_only_is_refused_by_path",
            ),
        ),
        "fork": (
            "the test is about a forked child, and holds something when it comes to that",
            (
                "region/test_arena.py::test_a_forked_child_does_not_hold_what_its_parent_has_parked",
                "region/test_segment.py::test_a_child_does_not_hold_leases_that_are_about_to_be_sent",
                "region/test_object.py::test_no_tracker_watches_and_nobody_speaks_of_leaks",
                "region/test_object.py::test_a_thousand_processes_killed_at_any_moment_leave_only_what_has_a_name",
                "region/test_object.py::test_a_child_of_a_pool_does_not_remove",
                "test_leaks.py::test_what_a_child_has_from_its_parent_is_not_the_child_s",
                "test_examples.py::test_example_runs[anonymous_memory.py]",
                "test_examples.py::test_example_runs[robust_mutex.py]",
                "test_examples.py::test_example_runs[shared_containers.py]",
                "test_examples.py::test_example_runs[supervise.py]",
                "test_examples.py::test_example_runs[team.py]",
                "test_examples.py::test_example_runs[worker_script.py]",
                "test_readme.py::test_a_program_runs_when_it_is_copied[Several-processes,-one-program-0]",
                "test_readme.py::test_a_program_runs_when_it_is_copied[Several-processes,-one-program-1]",
                "test_readme.py::test_a_program_runs_when_it_is_copied[Several-processes,-one-program-2]",
                "test_readme.py::test_a_program_runs_when_it_is_copied[Several-processes,-one-program-3]",
            ),
        ),
        "fork context": (
            "about several start methods: Windows has spawn alone",
            (
                "test_start_methods.py::test_a_context_is_one_for_both_libraries",
                "test_start_methods.py::test_fork_is_the_default_and_comes_first",
                "test_start_methods.py::test_the_start_method_is_set_once",
                "test_start_methods.py::test_a_process_takes_what_it_is_given",
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
            ("test_public_api.py::test_importing_it_starts_nothing",),
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
                "region/test_mapped_region.py::TestFlush::test_flushed_bytes_are_in_the_file_for_who_reads_past_the_cache",
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
    """Return why a test is left out on a backend, or None."""
    whole = nodeid.removeprefix("tests/")
    name = whole.partition("[")[0]
    for capability, (why, tests) in SKIPS.get(backend, {}).items():
        for test in tests:
            if test in (name, whole) or (test.endswith(".py") and name.partition("::")[0] == test):
                return f"needs {capability}: {why}"
    return None
