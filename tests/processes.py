"Run a function in several processes that train together, as `torchrun` does, forked from the tests to save the imports"
import faulthandler, os, socket, sys, time, traceback
import pytest, torch, torch.multiprocessing as mp
import fastai.distributed, torch._dynamo, torch._inductor.utils  # before the fork: what DistributedDataParallel imports, some seconds
from fastai_bs_finder.processes import broadcast_on_any_device


def _child(rank, n, port, folder, f, args, seconds):
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), ACCELERATE_USE_CPU='true')
    out = open(folder/f'{rank}.txt', 'w', buffering=1)
    os.dup2(out.fileno(), 1)
    sys.stdout = out
    faulthandler.dump_traceback_later(.9*seconds, file=out)
    torch.manual_seed(rank)  # no two processes have the same random state
    code = 1
    try:
        with broadcast_on_any_device(): torch.save(f(rank, *args), folder/f'{rank}.pt')
        code = 0
    except BaseException: traceback.print_exc(file=out)
    out.flush()
    os._exit(code)  # without pytest's own business


def run_processes(folder, n, f, *args, seconds=30):
    "What `f(rank, *args)` returns for each rank; `None` for one that was killed. All must end in time, and none with an exception"
    if torch.cuda.is_initialized(): pytest.skip('a GPU was used before in this process, which cannot fork now: run this file alone')
    folder.mkdir(exist_ok=True)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    processes = [mp.get_context('fork').Process(target=_child, args=(rank, n, port, folder, f, args, seconds)) for rank in range(n)]
    for p in processes: p.start()
    end = time.monotonic() + seconds
    for p in processes: p.join(max(end - time.monotonic(), 0))
    late = [rank for rank,p in enumerate(processes) if p.is_alive()]
    for p in processes: p.kill()
    assert not late, f'ranks {late} did not end within {seconds} seconds:\n' + '\n'.join((folder/f'{r}.txt').read_text() for r in late)
    bad = [rank for rank,p in enumerate(processes) if p.exitcode == 1]
    assert not bad, f'ranks {bad} failed:\n' + '\n'.join((folder/f'{r}.txt').read_text() for r in bad)
    return [torch.load(file, weights_only=False) if (file := folder/f'{rank}.pt').exists() else None for rank in range(n)]


def printed(folder, rank):
    "What a process printed, but for what Gloo of some versions says"
    return ''.join(o for o in (folder/f'{rank}.txt').read_text().splitlines(True) if not o.startswith('[Gloo]'))
