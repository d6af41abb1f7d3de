"The estimator, against stored gradients, brute force and sampling"
import math

import numpy as np, pytest, torch
from torch import nn

from fastai_bs_finder import noise
from fastai_bs_finder.noise import GradSums, Noise, NoiseAverage, NoiseMeter, ema_weights, fieller, noise_and_scale, sq_norm
from reference import ema, flat_grad, paper_estimate


def model_and_batches(sizes, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5)).to(dtype)
    return model,[(torch.randn(b, 20, dtype=dtype), torch.randint(5, (b,))) for b in sizes]


def gradients(model, x, y):
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize('b,k', [(1, 2), (8, 2), (16, 20), (3, 50)])
def test_equal_sizes_are_the_papers_estimate(b, k):
    model,batches = model_and_batches([b]*k)
    sums,stored = GradSums(),[]
    for x,y in batches:
        sums.add(gradients(model, x, y), b)
        stored.append(flat_grad(model))
    np.testing.assert_allclose(sums.noise_and_scale(), paper_estimate(stored, b), rtol=1e-5)


def test_unequal_sizes_against_stored_gradients():
    sizes = [1, 16, 32, 7, 7, 2]
    model,batches = model_and_batches(sizes)
    sums,stored = GradSums(),[]
    for x,y in batches:
        sums.add(gradients(model, x, y), len(x))
        stored.append(flat_grad(model))
    b,g = torch.tensor(sizes).double(),torch.stack(stored)
    N,m = b.sum(),(b[:, None]*g).sum(0)/b.sum()
    noise = (b*((g - m)**2).sum(1)).sum()/(len(sizes) - 1)   # the weighted sample variance, written as such
    np.testing.assert_allclose(sums.noise_and_scale(), (noise, (m**2).sum() - noise/N), rtol=1e-5)


@pytest.mark.parametrize('sizes', [[16]*5, [1, 16, 32, 7], [1, 32], [31, 1, 1, 1, 1]])
def test_unbiased(sizes):
    rng = np.random.default_rng(0)
    dim,n = 40,20_000
    G,sd = np.full(dim, dim**-.5),5/dim**.5                    # |G|² = 1, S = 25
    g = G + rng.normal(size=(n, len(sizes), dim))*sd/np.sqrt(sizes)[:, None]
    b,N = np.array(sizes),sum(sizes)
    A,C = ((g**2).sum(-1)*b).sum(1),(((g*b[:, None]).sum(1)/N)**2).sum(-1)*N
    noise,scale = noise_and_scale(A, C, N, len(sizes))
    for x,truth in ((noise, 25), (scale, 1)): assert abs(x.mean() - truth) < 4*x.std()/n**.5


def test_gradients_stay_as_they_are():
    model,((x, y), *_) = model_and_batches([8])
    grads = gradients(model, x, y)
    before = [g.clone() for g in grads]
    sums = GradSums()
    for _ in range(3): sums.add(grads, 8)
    sums.noise_and_scale()
    for g,old,mean in zip(grads, before, sums.pop_mean()):
        assert torch.equal(g, old) and mean.data_ptr() != g.data_ptr()
        torch.testing.assert_close(mean, old)


def test_mean_is_that_of_all_examples():
    model,batches = model_and_batches([5, 1, 30])
    sums = GradSums()
    for x,y in batches: sums.add(gradients(model, x, y), len(x))
    want = gradients(model, torch.cat([x for x,_ in batches]), torch.cat([y for _,y in batches]))
    for a,b in zip(sums.pop_mean(loss_scale=8.), want): torch.testing.assert_close(a, 8*b)
    assert (sums.k, sums.samples) == (0, 0)


def test_missing_gradients_count_as_zero():
    g = [torch.tensor([3., 4.]), torch.tensor([1.])]
    a,b = GradSums(),GradSums()
    a.add([g[0], None], 2), a.add([None, g[1]], 4), a.add([None, None], 1)
    b.add([g[0], torch.zeros(1)], 2), b.add([torch.zeros(2), g[1]], 4), b.add([torch.zeros(2), torch.zeros(1)], 1)
    assert a.noise_and_scale() == b.noise_and_scale()
    assert a.k == 3 and a.samples == 7


def test_no_gradient_at_all_is_not_a_number():
    sums = GradSums()
    for _ in range(2): sums.add([None, None], 4)
    assert all(map(math.isnan, sums.noise_and_scale()))
    meter = NoiseMeter()
    for _ in range(2): meter.add([None], 4)
    meter.measure()
    assert meter.measured == [] and math.isnan(meter.noise_scale)


def test_sparse_equals_dense():
    emb = nn.Embedding(10, 4)
    sparse = nn.Embedding(10, 4, sparse=True)
    sparse.load_state_dict(emb.state_dict())
    a,b = GradSums(),GradSums()
    for i in range(4):
        idx = torch.randint(10, (6,), generator=torch.Generator().manual_seed(i))
        for m,s in ((emb, a), (sparse, b)):
            m.zero_grad(set_to_none=True)
            (m(idx)**2).sum().backward()
            s.add([m.weight.grad], 6)
    np.testing.assert_allclose(a.noise_and_scale(), b.noise_and_scale(), rtol=1e-6)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_low_precision_is_summed_in_float32(dtype):
    big = torch.full((1000,), 200., dtype=dtype)               # the sum of squares is beyond float16
    assert sq_norm([big, torch.ones(3)]).item() == pytest.approx(4e7 + 3)
    sums = GradSums()
    for _ in range(300): sums.add([torch.full((4,), .01, dtype=dtype)], 1)   # adding .01 to 3 is lost in bfloat16
    mean, = sums.pop_mean()
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, torch.full((4,), .01, dtype=dtype).float(), rtol=1e-5, atol=0)


def test_complex_numbers_are_two_real_ones():
    torch.manual_seed(0)
    a,b = (GradSums() for _ in range(2))
    batches = [[torch.randn(5, 3, dtype=torch.complex64), torch.randn(4), torch.randn(2, dtype=torch.complex128), torch.randn(6, dtype=torch.complex64).conj()] for _ in range(6)]
    for i,grads in enumerate(batches):
        a.add(grads, 3 + i, loss_scale=2.)
        b.add([torch.view_as_real(g.resolve_conj()) if g.is_complex() else g for g in grads], 3 + i, loss_scale=2.)
    np.testing.assert_allclose(a.noise_and_scale(), b.noise_and_scale(), rtol=1e-5)
    for m,r in zip(a.pop_mean(), b.pop_mean()): torch.testing.assert_close(torch.view_as_real(m) if m.is_complex() else m, r)


@pytest.mark.filterwarnings('ignore:ComplexHalf')
@pytest.mark.parametrize('dtype', [torch.complex32, torch.complex64, torch.complex128])
def test_complex_norms(dtype):
    z = torch.tensor([3 + 4j, 1j]).to(dtype)
    assert sq_norm([z, torch.ones(3), z.to_sparse() if dtype != torch.complex32 else z]).item() == pytest.approx(26 + 3 + 26)
    assert not GradSums().add([torch.tensor([1., complex(0, math.nan)])], 2, skip_nonfinite=True)


def test_loss_scale_falls_out_even_when_it_changes():
    model,batches = model_and_batches([8]*4)
    a,b = GradSums(),GradSums()
    for i,(x,y) in enumerate(batches):
        g = gradients(model, x, y)
        a.add(g, 8)
        b.add([v*2.**(16 - i) for v in g], 8, loss_scale=2.**(16 - i))
    np.testing.assert_allclose(a.noise_and_scale(), b.noise_and_scale(), rtol=1e-6)


@pytest.mark.parametrize('bad', [math.inf, math.nan])
def test_a_batch_that_is_not_finite_can_be_left_out(bad):
    sums = GradSums()
    good = [torch.tensor([1., 2.])]
    assert sums.add(good, 3, skip_nonfinite=True)
    assert not sums.add([torch.tensor([1., bad])], 3, skip_nonfinite=True)
    assert sums.add([torch.tensor([2., 1.])], 3, skip_nonfinite=True)
    assert (sums.k, sums.samples) == (2, 6) and np.isfinite(sums.noise_and_scale()).all()


def test_a_measurement_that_is_not_finite_is_left_out():
    meter = NoiseMeter()
    for values in ([1., 2.], [1., math.inf], [2., 1.]):
        for v in values: meter.add([torch.tensor([v, 1.])], 4)
        meter.measure()
    assert len(meter.measured) == 2 and math.isfinite(meter.noise) and math.isfinite(meter.scale)


def test_squares_are_added_up_in_double_precision():
    one,many = torch.tensor([4096.]),[torch.ones(1)]*1000
    assert sq_norm([one, *many]).item() == 4096**2 + 1000
    sums = GradSums(per_element=False)
    for g in (one, *many): sums.add([g], 1)
    assert sums.batch_norms().item() == 4096**2 + 1000


def test_errors():
    with pytest.raises(ValueError, match="beta='x' is not in"): NoiseMeter('x')
    with pytest.raises(ValueError, match='bs=0: a batch has 1 example or more'): GradSums().add([torch.ones(2)], 0)
    with pytest.raises(ValueError, match='beta=1.0 is not in'): NoiseMeter(beta=1.)
    with pytest.raises(ValueError, match='beta=-0.1 is not in'): NoiseMeter(beta=-.1)
    sums = GradSums()
    sums.add([torch.ones(2)], 4)
    with pytest.raises(ValueError, match='1 batches: .* 2 or more'): sums.noise_and_scale()
    with pytest.raises(ValueError, match='2 gradients, but the batches before had 1'): sums.add([torch.ones(2)]*2, 4)


@pytest.mark.parametrize('beta', [0., .5, .9, .99])
def test_moving_average_is_the_recursion(beta):
    rng = np.random.default_rng(0)
    pairs = rng.normal(size=(30, 2)) + 3
    meter = NoiseMeter(beta)
    for pair,want in zip(pairs, ema(pairs, beta)):
        meter.append(Noise(*pair))
        np.testing.assert_allclose((meter.noise, meter.scale), want, rtol=1e-10)
        assert meter.noise_scale == pytest.approx(want[0]/want[1])


@pytest.mark.parametrize('beta', [0., .5, .9, .99])
@pytest.mark.parametrize('n', [1, 2, 3, 30])
def test_the_interval_of_the_average_is_that_of_all_measurements(n, beta):
    "The average keeps its mean and covariance up to date; `fieller` takes all measurements at once"
    pairs = np.random.default_rng(n).normal(size=(n, 2))*[1., .3] + [3., 1.]
    average = NoiseAverage(beta)
    for pair in pairs: average.append(Noise(*pair))
    assert average.interval() == pytest.approx(fieller(*pairs.T, ema_weights(n, beta)), nan_ok=True)


@pytest.mark.parametrize('seed', range(200))
def test_fieller_is_the_set_of_ratios_that_the_data_do_not_exclude(seed):
    rng = np.random.default_rng(seed)
    n = rng.integers(3, 30)
    beta = rng.choice([.5, .9, 1.])
    w = ema_weights(n, beta)
    S = rng.normal(5, 1, n)
    G = rng.normal(rng.choice([0, .1, 1]), .5, n)
    lo,hi = fieller(S, G, w)
    from scipy.stats import t
    n_eff = 1/(w**2).sum()
    R = np.geomspace(1e-3, 1e6, 20_000)
    D = S[:, None] - R*G[:, None]                              # for each ratio R: a plain weighted t-test of mean(S − R·G) = 0
    mean = w @ D
    se = np.sqrt(w @ (D - mean)**2/(n_eff - 1))
    inside = np.abs(mean) <= t.ppf(.975, n_eff - 1)*se
    if math.isnan(lo): assert (w @ G) < 0 and not inside.any()
    else: np.testing.assert_array_equal((R >= lo) & (R <= hi), inside)


def test_fieller_needs_three():
    assert all(map(math.isnan, fieller([1., 2.], [1., 2.])))
    assert all(map(math.isnan, fieller([], [])))
    assert all(map(math.isnan, fieller([1., 2., 3.], [1., 2., 3.], ema_weights(3, 0.))))


def test_fieller_has_no_upper_end_where_the_scale_may_be_zero():
    lo,hi = fieller([10., 11., 9., 10.], [.1, -.1, .2, -.05])
    assert 0 < lo < 1000 and hi == math.inf
    lo,hi = fieller([10., 11., 9., 10.], [1., 1.1, .9, 1.05])
    assert 0 < lo < 10 < hi < 15


def test_fieller_of_a_scale_below_zero_beyond_doubt():
    assert all(map(math.isnan, fieller([10., 11., 9., 10.], [-1., -1.1, -.9, -1.05])))


def test_fieller_where_the_noise_may_be_zero_too():
    assert fieller([1., -1., .5, -.4], [.1, -.1, .05, -.04]) == (0., math.inf)
    assert fieller([1., -1., .5, -.4], [1., 1.1, .9, 1.05])[0] == 0


def test_fieller_of_exact_data():
    assert fieller([6.]*4, [2.]*4) == (3., 3.)
    assert all(math.isnan(v) or v >= 0 for v in fieller([0.]*4, [0.]*4))


def test_meter_says_what_it_knows():
    meter = NoiseMeter()
    assert 'nan' in repr(meter) and math.isnan(meter.noise)
    torch.manual_seed(0)
    for _ in range(8):
        for _ in range(10): meter.add([1 + torch.randn(20)], 4)
        assert meter.n_batch == 10
        meter.measure()
    lo,hi = meter.interval()
    assert lo < meter.noise_scale < hi and f'{lo:.4g} to {hi:.4g}' in repr(meter)
    assert meter.interval(.5)[0] > lo


def test_the_mean_of_sparse_gradients_is_sparse():
    "Or SparseAdam refuses it; one dense gradient among them makes it dense"
    dense = [torch.tensor([[1., 2.], [0., 0.], [3., 4.]]), torch.tensor([[0., 0.], [0., 0.], [5., 6.]])]
    for kinds,sparse in ((('sparse', 'sparse'), True), (('sparse', 'dense'), False), (('dense', 'sparse'), False)):
        sums = GradSums()
        for g,kind in zip(dense, kinds): sums.add([g.to_sparse(1) if kind == 'sparse' else g], 4)
        mean, = sums.pop_mean()
        assert mean.is_sparse == sparse and torch.equal(mean.to_dense(), (dense[0] + dense[1])/2)
        if sparse: assert mean.sparse_dim() == 1 and mean._nnz() == 2
    sums.add(dense[:1], 4)
    assert not sums.pop_mean()[0].is_sparse                                   # nothing is left of the measurement before


# Squares per element, and the way without them

def all_kinds(k=6):
    "Gradients of all kinds, batch by batch: two dtypes at one place, some missing, and something that is sparse once and dense once"
    torch.manual_seed(0)
    def one(i):
        sparse = torch.randn(6, 3)*(torch.arange(6) % 2)[:, None]
        return [torch.randn(5, 3, dtype=torch.complex64), torch.randn(4) if i % 2 else None, torch.randn(7).bfloat16(), torch.randn(300, dtype=torch.float16),
                sparse.to_sparse(1), sparse.to_sparse(1) if i % 2 else sparse, torch.randn(6, dtype=torch.complex64).conj(), torch.randn(8).to(torch.float16 if i % 2 else torch.float32),
                torch.randn(3, 2, dtype=torch.complex64).to_sparse(1), torch.randn(3).expand(4, 3), torch.randn(2, dtype=torch.float64), None]
    return [one(i) for i in range(k)]


def numbers(g):
    g = g.to_dense() if g.is_sparse else g
    return (torch.view_as_real(g.resolve_conj()) if g.is_complex() else g).double()


def test_the_sums_of_all_kinds_of_gradients():
    sums,batches = GradSums(per_element=True),all_kinds()
    for i,grads in enumerate(batches): sums.add(grads, 3 + i, loss_scale=2.**i)
    for j in range(len(batches[0])):
        there = [(3 + i, 2.**i, numbers(grads[j])) for i,grads in enumerate(batches) if grads[j] is not None]
        if not there:
            assert sums.totals[j] is None and sums.squares[j] is None
            continue
        torch.testing.assert_close(numbers(sums.totals[j]), sum(b*g/s for b,s,g in there), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sums.squares[j].double(), sum(b*(g/s)**2 for b,s,g in there), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize('weighted', (False, True))
def test_both_ways_say_the_same(weighted):
    ways = [GradSums(per_element=o) for o in (True, False)]
    for i,grads in enumerate(all_kinds()):
        for s in ways: assert s.add(grads, 3 + i, 2.**i, i % 2 == 0, 1.5*i if weighted else None)
    assert ways[1].squares.count(None) == len(ways[1].squares) and ways[0].squares.count(None) == 1
    for a,b in zip(*(s.per_tensor() for s in ways)): np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('most', (16, 64))
def test_groups_cover_every_number_once(most, monkeypatch):
    monkeypatch.setattr(noise, '_most', dict(cpu=most))
    torch.manual_seed(0)
    ts = [torch.randn(s) for s in ((), (3,), (5, 20), (0,), (63,), (2, 2), (1000,))] + [torch.randn(40, 3).t(), None, torch.randn(9).double()]
    seen = [0]*len(ts)
    for places,a,b in noise.in_groups((ts, ts)):
        assert len({t.dtype for t in a}) == 1 and (len(a) == 1 or sum(t.numel() for t in a) <= most)
        for i,x,y in zip(places, a, b):
            assert torch.equal(x, y)
            seen[i] += x.numel()
    assert seen == [0 if t is None else t.numel() for t in ts]
    np.testing.assert_allclose(noise.sq_norms(ts), [0 if t is None else float(t.double().square().sum()) for t in ts], rtol=1e-6)
    np.testing.assert_allclose(noise.sq_norms([t if t is None else t.abs() for t in ts], squared=True), [0 if t is None else float(t.double().abs().sum()) for t in ts], rtol=1e-6)


@pytest.mark.parametrize('snr', (1., .01))
def test_sums_of_200_batches_in_float32(snr):
    "Of a million elements with noises of very different sizes, one measurement against float64: errors of some 1e-7 in the noise, and as much of it in the scale"
    torch.manual_seed(0)
    n,k,b = 10**6,200,16
    G,sd = torch.randn(n)*(snr/n)**.5,torch.logspace(-4, 0, n)
    sums,total,squares = GradSums(),torch.zeros(n, dtype=torch.float64),torch.zeros(n, dtype=torch.float64)
    for _ in range(k):
        g = G + torch.randn(n)*sd
        sums.add([g], b)
        total += b*g.double()
        squares += b*g.double()**2
    found = sums.noise_and_scale()
    exact = noise_and_scale(float(squares.sum()), float(total.square().sum()/(b*k)), b*k, k)
    assert found.noise == pytest.approx(exact.noise, rel=1e-6)
    assert abs(found.scale - exact.scale) < 1e-6*exact.noise/(b*k)


@pytest.mark.parametrize('at', (0, 2, 5))
def test_where_the_squares_do_not_fit_their_sums_are_kept(at, monkeypatch):
    "From the beginning, or from the first gradient of another parameter on: the measurement is the same, and others do not try again"
    torch.manual_seed(0)
    batches = [[torch.randn(5), torch.randn(3) if i >= at else None] for i in range(6)]
    expected,meter,start = GradSums(),NoiseMeter(),noise._start
    def full(sums, there, w, squared=False):
        if squared and any(i == 1 and sums[i] is None for i,_ in there): raise torch.OutOfMemoryError('no memory left')
        return start(sums, there, w, squared)
    for g in batches: expected.add(g, 4)
    monkeypatch.setattr(noise, '_start', full)
    for g in batches: meter.add(g, 4)
    assert meter.sums.per_element is False and meter.sums.squares is None
    for a,b in zip(meter.sums.per_tensor(), expected.per_tensor()): np.testing.assert_allclose(a, b, rtol=1e-5)
    mean,wanted = meter.measure(),expected.pop_mean()
    for a,b in zip(mean, wanted): torch.testing.assert_close(a, b)
    for g in batches: meter.add(g, 4)
    assert not any(s is not None for s in meter.sums.squares) and meter.sums.noise_and_scale() == pytest.approx(meter.measured[0], rel=1e-5)


@pytest.mark.parametrize('free,reserved,used,fits', [(10**6, 0, 0, True), (7_999, 0, 0, False), (8_000, 5_000, 5_000, True), (4_000, 9_000, 5_000, True), (4_000, 9_000, 5_001, False),
                                                     (8_000, 1_000, 10**9, True)])
def test_room_on_a_gpu(free, reserved, used, fits, monkeypatch):
    "Free, or reserved by PyTorch and never used. A step used more when its batch was larger: that does not matter"
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda d: (free, 10**9))
    monkeypatch.setattr(torch.cuda, 'memory_reserved', lambda d: reserved)
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda d: used)
    class OnGpu:
        def __init__(self, n, size): self.device,self.numel,self.element_size = torch.device('cuda', 0),lambda: n,lambda: size
    assert noise.has_room([OnGpu(600, 4), None, OnGpu(400, 2)]) == fits
    assert noise.has_room([torch.ones(10**4)])
