"The element-by-element rule: a second implementation, the truth where it is known, and input that is odd"
import math

import numpy as np, pytest, torch
from scipy.special import stdtrit
from scipy.stats import gamma

from fastai_bs_finder.adaptive import Elements, averaged, fewest, log_error, model_error, steps_and_lr, steps_interval
from fastai_bs_finder.noise import GradSums
from fastai_bs_finder.predict import rel_steps

sizes = np.array([16, 64, 256, 1024, 4096])


def measurements(G, S, n, bs=(64,)*10, seed=0):
    "`n` measurements, each a list of gradients of batches of `bs` examples"
    rng = torch.Generator().manual_seed(seed)
    return [[G + (S/b).sqrt()*torch.randn(len(G), generator=rng) for b in bs] for _ in range(n)]


def sums(grads, bs): return sum(b*g for b,g in zip(bs, grads)),sum(b*g*g for b,g in zip(bs, grads)),len(bs),sum(bs)


def found(G, S, n, bs=(64,)*10, **kwargs):
    elements = Elements(sizes, **kwargs)
    res = [elements.add(*sums(grads, bs)) for grads in measurements(G, S, n, bs)]
    assert res[0] is None
    return tuple(map(np.array, zip(*res[1:])))


def by_hand(history, now, bs, eps, keep):
    "φ and ν after the measurements in `history`, in double precision: no bins, one element after the other"
    def moments(grads):
        g,w,N = np.stack([x.double().numpy() for x in grads]),np.array(bs, float)[:, None],sum(bs)
        mean = (w*g).sum(0)/N
        noise = ((w*g*g).sum(0) - N*mean**2)/(len(bs) - 1)
        return mean**2,noise,mean**2 - noise/N
    weights = np.array([keep**i for i in range(len(history))][::-1])
    past = [moments(grads) for grads in history]
    square,noise = (np.average([m[i] for m in past], axis=0, weights=weights) for i in (0, 1))
    n,N = weights.sum()**2/(weights**2).sum(),sum(bs)
    ratios = np.array([0., *2.**np.arange(-5, 11)])
    variance = 2*(1 + 2*ratios)/n
    likelihood = np.array([gamma.pdf(z, (1 + ratios)**2/variance, scale=variance/(1 + ratios)) for z in N*square/noise])
    shares = np.full(len(ratios), 1/len(ratios))
    for _ in range(60):
        p = likelihood*shares
        shares = np.average(p/p.sum(1, keepdims=True), axis=0, weights=np.sqrt(noise))
    p = likelihood*shares
    p /= p.sum(1, keepdims=True)
    phi,nu = np.zeros(len(sizes)),np.zeros(len(sizes))
    for i,g2 in enumerate(moments(now)[2]):
        for j,b in enumerate(sizes):
            root = 1/sum(p[i, r]/math.sqrt(noise[i]*(ratios[r]/N + 1/b)) for r in range(len(ratios)))
            phi[j] += g2/(root + eps)
            nu[j] += (root/(root + eps))**2
    return phi,nu


@pytest.mark.parametrize('bs', [(64,)*10, (64, 32, 7), (1, 500)], ids=str)
@pytest.mark.parametrize('eps', [0, .05, 1.])
def test_against_a_second_implementation(bs, eps):
    rng = torch.Generator().manual_seed(1)
    S = torch.randn(300, generator=rng).exp()
    G = (S/30).sqrt()*torch.randn(300, generator=rng)
    history = measurements(G, S, 4, bs)
    elements = Elements(sizes, eps, keep=.7)
    for grads in history: res = elements.add(*sums(grads, bs))
    phi,nu = by_hand(history[:3], history[3], bs, eps, .7)
    np.testing.assert_allclose(res[0], phi, rtol=.02)
    np.testing.assert_allclose(res[1], nu, rtol=.02)


def test_squares_are_the_packages_own():
    bs = 64, 32, 64, 7
    G,S = torch.linspace(-1, 1, 50),torch.linspace(1, 40, 50)
    elements,own = Elements(sizes, 1e8),GradSums()
    for grads in measurements(G, S, 2, bs): res = elements.add(*sums(grads, bs))  # ε is far above all: each element counts by 1/ε
    for g,b in zip(grads, bs): own.add([g], b)
    assert res[0] == pytest.approx(float(own.per_tensor().scale.sum())/1e8, rel=1e-3)


def test_one_ratio_for_all_is_one_noise_scale():
    S = (2*torch.randn(4000, generator=torch.Generator().manual_seed(2))).exp()
    phi,nu = found((S/100).sqrt(), S, 40, eps=0)
    steps,lr = steps_and_lr(phi, nu, 1)
    assert steps == pytest.approx([rel_steps(b, 64, 100) for b in sizes], rel=.1)
    assert lr**2*steps == pytest.approx(np.ones(5), rel=.01)
    assert nu == pytest.approx(np.full_like(nu, 4000))


def test_noise_without_gradient_costs_nothing():
    "One of two tensors never has a gradient: with the fixed metric it halves the noise scale's use, here it changes nothing"
    S = torch.ones(4000)
    G = torch.full((4000,), .1)
    one,noise = Elements(sizes, 0),Elements(sizes, 0)
    with_,without = [],[]
    for a,b in zip(measurements(G, S, 60), measurements(0*G, S, 60, seed=1)):
        x,y = one.add(*sums(a, (64,)*10)),noise.add(*sums(b, (64,)*10))
        if x:
            without.append(x)
            with_.append([p + q for p,q in zip(x, y)])
    got,alone = (steps_and_lr(*map(np.array, zip(*o)), 1)[0] for o in (with_, without))
    assert got == pytest.approx(alone, rel=.1) and rel_steps(4096, 64, 200) < .8*alone[-1]


def test_odd_elements():
    G,S = torch.ones(6),torch.tensor([1., 1, 0, 0, 1, 1])
    G[3] = 0
    phi,nu = found(G, S, 3, bs=(8,)*4, eps=1e-5)
    assert np.isfinite(phi).all() and np.isfinite(nu).all() and (nu <= 6).all()
    nothing = found(0*G, 0*S, 3)
    assert not nothing[0].any() and not nothing[1].any()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        e,plain = Elements(sizes),Elements(sizes)
        for grads in measurements(G, S + 1, 3, (8,)*4):
            m,q,*n = sums([1e-3*g for g in grads], (8,)*4)
            m,q = m.to(dtype),q.to(dtype)
            res,same = e.add(m.reshape(2, 3), q.reshape(2, 3), *n),plain.add(m.float(), q.float(), *n)
        np.testing.assert_array_equal(res, same)
    assert found(G.new_zeros(0), S.new_zeros(0), 3)[0].shape == (2, 5)


def test_what_is_kept_is_two_numbers_per_element():
    e = Elements(sizes)
    for grads in measurements(torch.ones(1000), torch.ones(1000), 3): e.add(*sums(grads, (64,)*10))
    assert sum(v.numel() for v in vars(e).values() if torch.is_tensor(v)) == 2000


def test_averages_are_debiased_and_nothing_known_is_nan():
    assert averaged([[2.], [4.]], .5).ravel() == pytest.approx([2, (2*.25 + 4*.5)/.75])
    assert np.isnan(steps_and_lr(-np.ones((3, 5)), np.ones((3, 5)), 1)).all()
    phi = np.array([[1., 2], [-1, 1], [1., 2]])
    assert steps_and_lr(phi, np.ones((3, 2)), 0, beta=0)[0] == pytest.approx([1, .25])


def test_interval():
    rng = np.random.default_rng(0)
    true = 1/np.sqrt(1 + 100/sizes)
    inside = 0
    for _ in range(200):
        phi = true*(1 + .3*rng.standard_normal((12, 5)))
        pooled = (phi.mean(0)[1]/phi.mean(0))**2
        inside += (np.abs(np.log(pooled/(true[1]/true)**2)) <= stdtrit(11, .975)*log_error(phi, np.ones((12, 5)), 1) + 1e-9).mean()/200
    assert .93 < inside < .98
    phi = np.tile(true, (3, 1))
    steps,lo,hi = steps_interval(phi, np.ones((3, 5)), sizes, 1)
    assert hi/steps == pytest.approx([model_error, 1, *[model_error]*3]) and lo*hi == pytest.approx(steps**2)
    assert steps_interval(phi, np.ones((3, 5)), sizes, 1, steps0=40)[0].min() == fewest/40
    phi = true*np.array([[1, 1, 1, 1, 1.], [-.9, 1, -.9, .9, -.9], [1, 1, 1, 1, 1]])  # by these, next to nothing is known
    steps,lo,hi = steps_interval(phi, np.ones((3, 5)), sizes, 1, beta=0.)
    ratio = sizes[1]/sizes
    assert (lo >= np.minimum(1, ratio)/model_error**2 - 1e-9).all() and (hi <= np.maximum(1, ratio)*model_error**2 + 1e-9).all() and hi[-1] > 1.9
    assert np.isnan(steps_interval(phi[:1], np.ones((1, 5)), sizes, 1)[1]).all() and np.isnan(log_error(phi[:1], phi[:1], 1)).all()
