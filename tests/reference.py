"""The noise scale a second time, by other means: gradients stored whole, the paper's equations as printed, and the truth from per-example gradients.

Nothing here is shared with the package."""
import torch
from torch import nn
from torch.func import functional_call, grad, vmap


def flat_grad(model):
    "The gradients of all parameters as one float64 vector"
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


def paper_estimate(grads, b):
    "(S, |G|²) from the stored gradients of batches of `b` examples: McCandlish et al. 2018, appendix A.1, with B_small = b and B_big = kb"
    G = torch.stack(grads)
    b_big = b*len(G)
    small,big = (G**2).sum(1).mean(),(G.mean(0)**2).sum()
    scale = (b_big*big - b*small)/(b_big - b)
    noise = (small - big)/(1/b - 1/b_big)
    return noise.item(),scale.item()


def mock_training(model, opt, loss_func, batches, n_batch, n_train):
    "Measurements along a mock training, as `(noise, scale)` pairs, in a plain loop over the list `batches`; four rounds or more begin with training"
    first = n_train if len(batches) >= 4*(n_batch + n_train) else 0
    res,batches = [],iter(batches)
    def backward(x, y):
        opt.zero_grad()
        loss_func(model(x), y).backward()
    try:
        for _ in range(first):
            backward(*next(batches))
            opt.step()
        while True:
            stored,sizes = [],[]
            for _ in range(n_batch):
                x,y = next(batches)
                backward(x, y)
                stored.append(flat_grad(model))
                sizes.append(len(x))
            assert len(set(sizes)) == 1
            res.append(paper_estimate(stored, sizes[0]))
            mean,i = torch.stack(stored).mean(0),0
            for p in model.parameters():
                p.grad = mean[i:i + p.numel()].view_as(p).to(p.dtype)
                i += p.numel()
            opt.step()
            for _ in range(n_train):
                backward(*next(batches))
                opt.step()
    except StopIteration: return res


def ema(pairs, beta):
    "Debiased exponential moving averages of noise and scale, by the recursion"
    s = g = 0.
    res = []
    for t,(noise,scale) in enumerate(pairs, 1):
        s,g = beta*s + (1 - beta)*noise,beta*g + (1 - beta)*scale
        res.append((s/(1 - beta**t), g/(1 - beta**t)))
    return res


def per_example_grads(model, X, y, loss_func=nn.functional.cross_entropy):
    "The gradient of each example's loss, one float64 row per example"
    params = {k: p.detach() for k,p in model.named_parameters()}
    def loss(params, x, t): return loss_func(functional_call(model, params, (x[None],)), t[None])
    each = vmap(grad(loss), in_dims=(None, 0, 0))(params, X, y)
    return torch.cat([g.flatten(1) for g in each.values()], 1).double()


def per_example_truth(model, X, y):
    "(S, |G|²) of the distribution that the examples came from: S/(|G_train|² − S/n) is what batches without replacement estimate"
    g,n = per_example_grads(model, X, y),len(X)
    G2 = (g.mean(0)**2).sum().item()
    S = ((g**2).sum().item()/n - G2)*n/(n - 1)
    return S,G2 - S/n


def mlp_truth(model, X, y):
    "`per_example_truth` for an MLP, fast: a linear layer's per-example gradient is δaᵀ, so its squared norm is |δ|²|a|²"
    n,acts,deltas,hooks = len(X),[],[],[]
    for layer in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        def hook(m, inp, out):
            acts.append(inp[0].detach())
            out.retain_grad()
            deltas.append(out)
        hooks.append(layer.register_forward_hook(hook))
    params = list(model.parameters())
    old = [p.grad for p in params]
    for p in params: p.grad = None
    try:
        training,_ = model.training,model.eval()
        nn.functional.cross_entropy(model(X), y, reduction='sum').backward()
        model.train(training)
        squares = sum(((d.grad.double()**2).sum(1)*((a.double()**2).sum(1) + 1)).sum().item() for a,d in zip(acts, deltas))
        G2 = sum(((p.grad.double()/n)**2).sum().item() for p in params)
    finally:
        for h in hooks: h.remove()
        for p,g in zip(params, old): p.grad = g
    S = (squares/n - G2)*n/(n - 1)
    return S,G2 - S/n
