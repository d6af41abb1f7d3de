"""Run a function in several processes that train together, as `torchrun` does.

They are forked from the tests, which saves the imports, and stay for the tests that follow, which saves what is done only once"""
import faulthandler, gc, os, random, signal, socket, sys, time, traceback
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import wait

import cloudpickle, numpy as np, pytest, torch
import fastai.callback.core, fastai.distributed, torch._dynamo, torch._inductor.utils  # before the fork: what DistributedDataParallel imports, some seconds
from accelerate.state import AcceleratorState, GradientState
from fastai_bs_finder.processes import broadcast_on_any_device

for name,o in vars(fastai.callback.core).items():  # its exceptions say that they are fastcore's, where pickle does not find them
    if name.startswith('Cancel'): o.__module__ = 'fastai.callback.core'


def _forget_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextmanager
def _nothing_left_behind():
    "What a task sets for all of its process is put back"
    env,handler,functions = dict(os.environ),signal.getsignal(signal.SIGINT),dict(vars(torch.distributed))
    try: yield
    finally:
        vars(torch.distributed).clear()
        vars(torch.distributed).update(functions)
        if torch.distributed.is_initialized(): torch.distributed.destroy_process_group()
        _forget_accelerate()
        signal.signal(signal.SIGINT, handler)
        os.environ.clear()
        os.environ.update(env)
        gc.collect()


def _run(rank, n, port, folder, task, seconds):
    "Whether the task came to its end; what it printed, and its exception, are in one file, what it returned in another"
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), ACCELERATE_USE_CPU='true')
    random.seed(rank), np.random.seed(rank), torch.manual_seed(rank)  # no two processes have the same random state
    torch.set_num_threads(1)
    with open(folder/f'{rank}.txt', 'w', buffering=1) as out:
        os.dup2(out.fileno(), 1)
        sys.stdout = out
        faulthandler.dump_traceback_later(.9*seconds, file=out)
        try:
            f,args = cloudpickle.loads(task)
            with broadcast_on_any_device(): torch.save(f(rank, *args), folder/f'{rank}.pt')
            return True
        except BaseException: traceback.print_exc(file=out)
        finally:
            faulthandler.cancel_dump_traceback_later()
            sys.stdout = sys.__stdout__
    return False


def _serve(pipe):
    "Do one task after the other, until the tests end"
    torch.cuda.is_available = lambda: False  # a GPU cannot be used after a fork
    _forget_accelerate()                     # the process that forked may have used it by itself
    gc.freeze()                              # what was there before need not be looked at after each task
    while True:
        task = pipe.recv()
        with _nothing_left_behind(): done = _run(*task)
        pipe.send(done)


class Process:
    "A process that waits for tasks; none of `multiprocessing`, whose children some tests count, or end"
    def __init__(self):
        self.pipe,its_end = Pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                self.pipe.close()
                _serve(its_end)
            finally: os._exit(1)  # without pytest's own business
        its_end.close()

    def outcome(self):
        "Of its task, once there is one: 'done' or 'failed', as it says, or 'gone', where it says nothing"
        try: return 'done' if self.pipe.recv() else 'failed'
        except (EOFError, ConnectionResetError): return 'gone'

    def end(self):
        "At once; the exit code, which is negative where a signal ended it"
        os.kill(self.pid, signal.SIGKILL)
        self.pipe.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


_pool = []


def run_processes(folder, n, f, *args, seconds=30):
    """What `f(rank, *args)` returns for each rank; `None` for one that was killed. All must end in time, and none with an exception.

    The processes stay for the next task if all of them came to the end of this one"""
    if torch.cuda.is_initialized() and len(_pool) < n: pytest.skip('a GPU was used before in this process, which cannot fork now: run this file alone')
    folder.mkdir(exist_ok=True)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    while len(_pool) < n: _pool.append(Process())
    processes,task,outcomes,end = _pool[:n],cloudpickle.dumps((f, args)),{},time.monotonic() + seconds
    try:
        for rank,p in enumerate(processes): p.pipe.send((rank, n, port, folder, task, seconds))
        while waiting := {p.pipe: rank for rank,p in enumerate(processes) if rank not in outcomes}:
            ready = wait(waiting, max(end - time.monotonic(), 0))
            if not ready: break
            for rank in map(waiting.get, ready): outcomes[rank] = processes[rank].outcome()
    finally:  # a test that is interrupted here leaves tasks behind that nobody waits for
        if list(outcomes.values()) != ['done']*n:
            del _pool[:n]
            codes = [p.end() for p in processes]
    late = [rank for rank in range(n) if rank not in outcomes]
    assert not late, f'ranks {late} did not end within {seconds} seconds:\n' + '\n'.join((folder/f'{r}.txt').read_text() for r in late)
    bad = [rank for rank,o in outcomes.items() if o == 'failed' or o == 'gone' and codes[rank] >= 0]
    assert not bad, f'ranks {bad} failed:\n' + '\n'.join((folder/f'{r}.txt').read_text() for r in bad)
    return [torch.load(folder/f'{rank}.pt', weights_only=False) if outcomes[rank] == 'done' else None for rank in range(n)]


def printed(folder, rank):
    "What a process printed, but for what Gloo of some versions says"
    return ''.join(o for o in (folder/f'{rank}.txt').read_text().splitlines(True) if not o.startswith('[Gloo]'))
