"The processes that tests run in: they stay, no task finds what another one left, and whatever goes wrong is said"
import os, random, signal, time

import numpy as np, pytest, torch
from accelerate.state import AcceleratorState, PartialState

from processes import printed, run_processes


def own_pid(rank): return os.getpid()


def test_they_stay(tmp_path):
    first = run_processes(tmp_path, 3, own_pid)
    assert len({os.getpid(), *first}) == 4
    assert run_processes(tmp_path, 2, own_pid) == first[:2] and run_processes(tmp_path, 3, own_pid) == first


def found(rank):
    "What a task may find of those before it"
    return dict(draws=[random.random(), np.random.rand(), torch.rand(1).item()], connected=torch.distributed.is_initialized(), accelerate=(PartialState._shared_state, AcceleratorState._shared_state),
                all_reduce=torch.distributed.all_reduce.__qualname__, env=dict(os.environ) | dict(MASTER_PORT=None), interrupt=signal.getsignal(signal.SIGINT) is signal.default_int_handler, threads=torch.get_num_threads())


def test_nothing_is_left_for_the_next_task(tmp_path):
    def leave(rank):
        found(rank)  # draws random numbers
        PartialState()
        torch.distributed.all_reduce = leave
        os.environ['LEFT'] = 'behind'
        del os.environ['WORLD_SIZE']
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        torch.set_num_threads(2)
        after = found(rank)
        return {k for k in before[rank] if after[k] == before[rank][k]}
    before = run_processes(tmp_path, 2, found)
    assert before[0]['threads'] == 1 and not any(a == b for a,b in zip(*(o['draws'] for o in before)))
    assert run_processes(tmp_path, 2, leave) == [set()]*2
    assert run_processes(tmp_path, 2, found) == before


def test_an_exception_is_shown_and_others_take_their_place(tmp_path):
    def f(rank):
        print(f'this is rank {rank}')
        if rank: raise ZeroDivisionError('no luck')
    before = run_processes(tmp_path, 2, own_pid)
    with pytest.raises(AssertionError, match=r"(?s)ranks \[1\] failed:\nthis is rank 1\n.*ZeroDivisionError: no luck") as e: run_processes(tmp_path, 2, f)
    assert 'rank 0' not in str(e.value) and printed(tmp_path, 0) == 'this is rank 0\n'
    assert not set(before) & set(run_processes(tmp_path, 2, own_pid))


def test_one_that_is_killed_returns_nothing(tmp_path):
    def f(rank): return os.kill(os.getpid(), signal.SIGKILL) if rank else 'here'
    before = run_processes(tmp_path, 3, own_pid)
    assert run_processes(tmp_path, 2, f) == ['here', None]
    after = run_processes(tmp_path, 3, own_pid)
    assert not set(before[:2]) & set(after) and before[2] in after


def test_one_that_leaves_without_a_word_is_an_error(tmp_path):
    with pytest.raises(AssertionError, match=r'ranks \[1\] failed'): run_processes(tmp_path, 2, lambda rank: os._exit(0) if rank else None)


def test_one_that_does_not_end(tmp_path):
    "Is ended, and says where it was"
    def forever(rank):
        while rank: time.sleep(.1)
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r'(?s)ranks \[1\] did not end within 1 seconds:\n.*Timeout.*in forever'): run_processes(tmp_path, 2, forever, seconds=1)
    assert time.monotonic() - start < 10
    assert len(run_processes(tmp_path, 2, own_pid)) == 2


def test_the_result_is_that_of_the_last_task(tmp_path):
    "In the folder of another one, too"
    def f(rank, value): return value if rank else os.kill(os.getpid(), signal.SIGKILL)
    assert run_processes(tmp_path, 2, lambda rank: rank) == [0, 1]
    assert run_processes(tmp_path, 2, f, 'new') == [None, 'new']
