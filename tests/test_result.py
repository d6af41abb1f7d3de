"What a result knows of itself, and what is computed from it"
import gc, math, pickle, types, weakref
from pathlib import Path

import numpy as np, pandas as pd, pytest
from fastai.learner import Recorder
from hypothesis import given, strategies as st

from fastai_bs_finder import result as result_module
from fastai_bs_finder.predict import growth, noiseless_mean, rel_examples, rel_steps, scale_lr
from fastai_bs_finder.result import BSResult, NoiseScaleResult, Profile, Race, Run, SweepResult, advised_bs, keep_result, mean_noise_scale
from fastai_bs_finder.suggest import average, critical, fastest
from fastai_bs_finder.demo import digits_learner
from results import result

inf,nan = math.inf,math.nan
linear = {b: .004 + 2e-5*b for b in (16, 64, 256, 1024)}   # seconds: half of the throughput at 200 examples
known = (350, 300, 400),(400, 300, 500),(450, 350, 600)


def test_the_mean_noise_scale():
    def mean(*rows): return result(*rows).mean_noise_scale
    assert mean((100, 100, 100), (100, 100, 100)) == pytest.approx((100, 100, 100))
    B,lo,hi = mean((100, nan, nan), (200, 100, 400), (-50, 300, inf))
    assert B == pytest.approx(noiseless_mean([100, 200, 300], 64)) and lo == pytest.approx(noiseless_mean([100, 300], 64)) and hi == inf   # as open as the last one
    assert mean((-50, 300, inf), (200, 100, 400))[2] == pytest.approx(noiseless_mean([inf, 400], 64))
    t = result((-5, nan, nan), (100, 0, 400), (100, 0, 400)).table
    assert t.lr_lo[256] == .1 and t.steps_hi[256] == 1   # no noise at all, for all we know
    assert mean((-50, 300, inf))[2] == inf
    for ns,used in (600, 600), (10**6, 800), (-50, 200): assert mean((ns, 200, inf))[0] == pytest.approx(used)
    for rows in ([(-50, 0, inf)], [(-50, nan, nan)]): assert mean(*rows) is None


def measured(noises, scales, average=(100., 1.)):
    "Rows of single measurements, whose averages are all the same"
    noise,scale = average
    return pd.DataFrame(dict(noise=noise, scale=scale, noise_scale=noise/scale, lo=nan, hi=nan, raw_noise=noises, raw_scale=scales))


def test_the_mean_noise_scale_is_of_single_measurements():
    "Not of averages, which go along with each other; each counts as much as the others, however long its gradient"
    assert mean_noise_scale(measured([90, 100, 110, 100], [1, 1, 1, 1]), 64)[0] == pytest.approx(100)
    B,lo,hi = mean_noise_scale(measured([90, 100, 110, 100, 95, 105], [.8, 1, 1.2, .9, 1.1, 1]), 64)
    assert B == pytest.approx(100) and 60 < lo < B < hi < 160
    shrinking = measured([100, 100, 100, 100], [4, 4, 1, 1]).assign(noise=[100, 100, 25, 25], scale=[4, 4, 1, 1], raw_noise=[100, 100, 25, 25])
    assert mean_noise_scale(shrinking, 64)[0] == pytest.approx(25)
    open_end = mean_noise_scale(measured([100]*6, [.5, 2, -1, 1.5, .1, -.3]), 64)
    assert open_end[2] == inf and 0 < open_end[1] <= open_end[0] <= 4*open_end[1]
    assert mean_noise_scale(measured([90, 100], [1, 1]), 64) == pytest.approx((100, 100, 100))   # too few: the averages


def test_the_noise_scale_of_the_training_to_come():
    r = result(*known, n=50_000, n_epoch=10, spent=200)
    assert r.noise_scale_ahead == pytest.approx([B*growth(200*64, 500_000) for B in r.mean_noise_scale]) and r.noise_scale_ahead[0] > 2*r.mean_noise_scale[0]
    assert r.changed(measured_bs=16).noise_scale_ahead[0] > r.noise_scale_ahead[0]   # then it has seen less
    for facts in (dict(n=None), dict(spent=10**6), dict(spent=0)): assert (s := r.changed(**facts)).noise_scale_ahead == pytest.approx(s.mean_noise_scale)
    assert r.changed(alike=True).noise_scale_ahead is None


@st.composite
def trainings(draw):
    "Results with times, of trainings short and long"
    B,lo,hi,bs = draw(st.floats(1, 1e5)),draw(st.floats(.05, 1)),draw(st.floats(1, 20) | st.just(inf)),draw(st.sampled_from([1, 16, 50, 64, 512]))
    overhead,cost = draw(st.floats(1e-5, .1)),draw(st.floats(1e-7, 1e-3))
    return result(*[(B, B*lo, B*hi)]*3, bs=bs, n=draw(st.none() | st.integers(bs, 10**6)), n_epoch=draw(st.integers(1, 50)), spent=draw(st.sampled_from([60, 10**6])),
                  lr_given=draw(st.floats(1e-4, 1)), opt=draw(st.sampled_from(['sgd', 'adam'])), max_bs=draw(st.none() | st.integers(bs, 10**5)),
                  step_time={b: overhead + cost*b for b in {max(bs//4, 1), bs, 4*bs}} if draw(st.booleans()) or bs == 1 else {})


def test_the_band_is_as_wide_as_the_times_are_uncertain():
    known = dict(opt='adam', step_time={16: 1., 64: 1.2, 256: 2.})
    steady,rough = (result(*[(300, 250, 350)]*3, **known, timings={64: t}) for t in ([1.2]*20, [1.2, .8, 1.6]*4))
    (lo,hi),(low,high) = steady.band,rough.band
    assert steady.tolerance == .1 < rough.tolerance < .5 and low < lo and hi <= high
    assert rough.times(2).time[[low, high]].max() <= (1 + rough.tolerance)*rough.times().time.min()
    assert f"Batch sizes from {low} to {high} are about as fast (within {rough.tolerance:.0%})" in ' '.join(str(rough).split())
    unknown = result(*[(300, 250, 350)]*3, opt='adam', step_time={16: .35, 64: 1.2, 256: 4.7}, timings={64: [1.2]*8 + [6.]*8})
    assert unknown.band[0] <= unknown.advised == 64 <= unknown.band[1]
    assert unknown.tolerance > 1 and 'are about as fast' not in str(unknown) and 'Step times are known only to within' in ' '.join(str(unknown).split())


@given(trainings())
def test_the_band_holds_the_shortest_time(r):
    times = r.times()
    if times is None:
        assert r.band is None and not r.profile.step_time
        return
    (lo,hi),beyond = r.band,r.times(2).time
    assert lo <= times.time.idxmin() <= hi and beyond[lo] <= 1.1*times.time.min() and beyond[hi] <= 1.1*times.time.min()
    assert times.time[r.run.bs] == pytest.approx(1) and (times.worst >= times.time - 1e-9).all() and (times.regret >= 0).all()
    assert (times.regret + 1 >= times.time/times.time.min() - 1e-9).all() and times.index.max() <= max(*r.profile.step_time, r.run.bs)
    assert all(b <= (r.largest or inf) for b in times.index if b != r.run.bs)


@given(trainings(), st.none() | st.integers(1, 40), st.sampled_from([1, 8, 32, 96, 768, 4096]))
def test_a_plan_is_a_training_of_as_much_use(r, n_epoch, bs):
    epochs,run = n_epoch or r.run.n_epoch,r.run
    assert r.plan(run.bs, n_epoch)[:2] == (epochs, run.lr_given)
    if r.step_time: assert r.plan(run.bs, n_epoch)[2] == pytest.approx(1)
    found,lr,time = r.plan(bs, n_epoch)
    assert type(found) is int and found >= 1 and lr == r.at_bs(bs)['lr']
    if run.n: assert found*max(run.n/bs, 1) >= min(100, epochs*run.n/run.bs)*(1 - 1e-5)
    if r.step_time: assert time == pytest.approx(found/epochs*run.bs/bs*r.at_bs(bs)['time']/r.at_bs(bs)['steps'])
    assert math.isnan(time) == (r.step_time is None)


def test_a_smaller_size_has_epochs_for_the_largest_noise_scale():
    rows = [(30, 15, 300)]*3
    r,largest = (result(*o, n=5000, bs=512, n_epoch=20, step_time={64: .01, 512: .06}) for o in (rows, [(300, 299, 301)]*3))
    assert r.plan(64)[0] == largest.plan(64)[0] > 20*r.table.epochs[64] and r.plan(512)[0] == 20
    assert r.times().time[64] == pytest.approx(largest.times().time[64], rel=.01) and r.plan(64)[2] == pytest.approx(r.times().time[64], rel=.1)
    never = result(*[(30, 15, inf)]*3, n=5000, bs=512, n_epoch=20, step_time={64: .01, 512: .06})
    assert never.plan(64)[0] == 20 and never.times().time[64] > 1


def test_no_plan_without_a_noise_scale(): assert result((-50, 0, inf)).plan(128) is result().plan(64) is None


@pytest.mark.parametrize('losses,errors,bs,winner', [
    ([.5, .4], [0, .01], 256, 256), ([.4, .5], [0, .01], 256, 64), ([.4, .41], [0, .01], 256, 256),   # within the noise there is no winner
    ([.4, .41], [0, .01], 64, 64), ([.5, .4], [0, .01], 64, 256), ([.5, .4, .3], [0, .01, .01], 256, 512), ([.5, .4, .39], [0, .01, .01], 256, 256),
    ([.4, nan], [0, nan], 256, 64), ([nan, nan], [nan, nan], 256, 256), ([.4, inf], [0, nan], 256, 64), ([nan, .4], [nan, nan], 64, 256),
    ([.4, .5], [0, nan], 256, 256)])   # from a single batch there is no telling what is noise
def test_who_is_ahead_in_a_race(losses, errors, bs, winner):
    sizes = [64, 256, 512][:len(losses)]
    race = Race(sizes, [30, 10, 5][:len(losses)], 1., losses, errors)
    assert race.winner(bs) == winner
    r = result(*[(1e4, 9e3, 1.1e4)]*3, step_time={64: .01, 256: .0101})
    assert fastest(r) == 256
    if bs == 256: assert fastest(r.changed(race=race)) == winner


def test_a_race_survives_a_file(tmp_path):
    r = result(*known).changed(race=Race([64, 256], [30, 10], 1.5, [.5, .4], [0, .01]))
    r.to_csv(tmp_path/'result.csv')
    assert BSResult.from_csv(tmp_path/'result.csv').race == r.race


def test_times_that_are_scattered_are_said_to_be():
    assert Profile(timings={64: [1.]*10}).unsteady == Profile(timings={64: [1, 5, 9]}).unsteady == Profile().unsteady == 0
    few,many = ([1., 2.]*n for n in (4, 16))
    assert Profile(timings={64: few}).unsteady == pytest.approx(2*Profile(timings={64: many}).unsteady, rel=.2)
    assert Profile(timings={64: few}).unsteady > .2
    assert Profile(timings={64: [1.]*10, 256: few}).unsteady == Profile(timings={256: few}).unsteady
    assert Profile(timings={64: [1.]*8 + [1.3]*8}).unsteady > .08 > Profile(timings={64: [1., 1.3]*8}).unsteady  # the machine was slower for a while


def test_the_optimizers_metric_is_used_where_it_was_measured():
    both = result((100, 90, 110), (100, 90, 110), opt_rows=[(nan, nan, nan), (400, 390, 410)])
    assert both.mean_noise_scale[0] == pytest.approx(400) and critical(both) == 384 and average(both) == 384
    none = result((100, 90, 110), opt_rows=[(nan, nan, nan)])
    none.stats.opt_noise = nan
    none = none.changed(bs=64)
    assert none.mean_noise_scale[0] == pytest.approx(100) and critical(none) == 96


def test_the_table():
    s = result(*known, step_time=linear, max_bs=3000)
    t,(B,lo,hi) = s.table,s.noise_scale_ahead
    assert type(t) is pd.DataFrame and t is s.table   # computed once
    assert list(t.columns[:7]) == 'steps examples epochs time sec_per_epoch lr fits'.split() and t.index.name == 'bs'
    assert t.index.is_monotonic_increasing and t.index[-1] == 49152 and t.index[0] == 8 and set(t.index) - {2**i for i in range(17)} == {3*2**i for i in range(2, 15)}
    assert (t.loc[64, ['steps', 'examples', 'epochs', 'time']] == 1).all() and t.lr[64] == .1
    for b in (16, 256, 2048):
        assert t.steps[b] == pytest.approx(rel_steps(b, 64, B)) and t.examples[b] == t.epochs[b] == pytest.approx(rel_examples(b, 64, B))
        assert t.time[b] == pytest.approx(rel_steps(b, 64, B)*(.004 + 2e-5*b)/(.004 + 2e-5*64)) and t.sec_per_epoch[b] == pytest.approx((.004 + 2e-5*b)*50_000/b)
        assert t.lr[b] == pytest.approx(scale_lr(.1, 64, b, B, 'sgd'))
        assert (t.steps_lo[b], t.steps_hi[b]) == pytest.approx(sorted(rel_steps(b, 64, x) for x in (lo, hi)))
    for q in ('steps', 'examples', 'epochs', 'time'): assert ((t[f'{q}_lo'] <= t[q]) & (t[q] <= t[f'{q}_hi'])).all()
    assert type(t.lr[256]) is float and type(t.loc[256].lr) is float
    assert t.fits.tolist() == ['yes']*len(t[t.index <= 3000]) + [f'accumulate {k}' for k in (2, 2, 3, 3, 5, 6, 9, 11, 17)]
    assert t.time[4096] == pytest.approx(rel_steps(4096, 64, B)*2*(.004 + 2e-5*2048)/(.004 + 2e-5*64))


def test_the_table_of_little():
    t = result(*known, bs=100, n=None, lr_given=slice(.01, .1)).table
    assert 100 in t.index and t.index[-1] <= 8*600 and t.time.isna().all() and (t.fits == '').all() and isinstance(t.lr[128], slice)
    assert result((-50, 0, inf)).table is None


def test_a_suggestion_that_is_no_round_number_has_a_row():
    r = result(*known, suggested=dict(mine=55, odd=nan, none=None))
    assert r.table.steps[55] == r.at_bs(55)['steps'] == pytest.approx(rel_steps(55, 64, r.noise_scale_ahead[0]))


@pytest.mark.parametrize('suggested,advised', [
    (dict(critical=192, fastest=64), 64), (dict(critical=192, fastest=None), None), (dict(mine=55, critical=192), 192), (dict(mine=55), 55), (dict(words='many', none=None, mine=np.int64(48)), 48),
    (dict(half=.5, nan=nan, inf=inf), None), (dict(whole=64.), 64), (dict(yes=True), None), ({}, None)])
def test_the_advice_of_several_suggestions(suggested, advised): assert advised_bs(suggested) == advised and result(*known, suggested=suggested).advised == advised


def test_a_result_does_not_change():
    r = result(*known)
    for o,name in ((r, 'stats'), (r.run, 'bs'), (r.profile, 'max_bs')):
        with pytest.raises(AttributeError): setattr(o, name, 1)
    assert r.changed(bs=32, max_bs=7).run.bs == 32 and r.run.bs == 64 and r.profile.max_bs is None


def test_columns_and_rows_as_of_the_table():
    r = result(*known)
    assert len(r) == 3 and r.lo.iloc[-1] == 350 and r['hi'].max() == 600 and r.loc[0, 'noise_scale'] == 350 and r[r.lo > 300].shape[0] == 1
    with pytest.raises(AttributeError): r.nothing_of_the_kind


facts = st.fixed_dictionaries({}, optional=dict(bs=st.integers(1, 10**6), n=st.none() | st.integers(1, 10**9), lr=st.floats(0, 10), opt=st.sampled_from(['sgd', 'adam']),
                                                lr_given=st.floats(0, 1) | st.builds(slice, st.none() | st.floats(0, 1), st.floats(0, 1)) | st.lists(st.floats(0, 1), min_size=1),
                                                stopped=st.sampled_from(['', 'loss']), max_bs=st.none() | st.integers(1, 10**6), error=st.text(max_size=20),
                                                step_time=st.dictionaries(st.integers(1, 10**6), st.floats(1e-6, 10))))


@given(facts, st.lists(st.tuples(st.floats(.1, 1e9), st.floats(0, 1e9) | st.just(nan), st.floats(0, 1e9) | st.sampled_from([nan, inf])), max_size=4), st.none() | st.integers(1, 10**6))
def test_pickle_and_csv_lose_nothing(tmp_path_factory, facts, rows, mine):
    r,file = result(*rows, suggested=dict(mine=mine), **facts),tmp_path_factory.getbasetemp()/'result.csv'
    r.to_csv(file)
    for again in (BSResult.from_csv(file), pickle.loads(pickle.dumps(r))):
        if len(r): pd.testing.assert_frame_equal(again.stats, r.stats)
        assert repr((again.run, again.profile, again.suggested)) == repr((r.run, r.profile, r.suggested)) and list(again.stats) == list(r.stats)
    assert len(pd.read_csv(file, comment='#')) == len(rows)


def test_csv_of_sweeps_and_trainings(tmp_path):
    stats = pd.DataFrame(dict(bs=[16, 64], lr=pd.Series([slice(None, .1, None), [.1, .2]], dtype=object), loss=[.5, nan], best=[True, False]))
    sweep = SweepResult(stats, target=.5, bs_in_use=16, too_large=128, fit=dict(critical=3.5))
    sweep.to_csv(tmp_path/'sweep.csv')
    again = SweepResult.from_csv(tmp_path/'sweep.csv')
    assert again.lr.tolist() == sweep.lr.tolist() and (again.target, again.bs_in_use, again.too_large, again.fit) == (.5, 16, 128, dict(critical=3.5))
    track = NoiseScaleResult(pd.DataFrame(dict(batch=[1], bs=[16])), share=.1, seconds=1.5)
    track.to_csv(tmp_path/'track.csv')
    assert NoiseScaleResult.from_csv(tmp_path/'track.csv').share == .1
    (tmp_path/'other.csv').write_text('a,b')
    with pytest.raises(ValueError, match='does not begin with the header line'): BSResult.from_csv(tmp_path/'other.csv')


def test_results_outlive_a_reload():
    "`%autoreload`, or another copy of the module's code in the same process: the properties read what the other wrote"
    rec,copy = Recorder(),types.ModuleType('copy of result')
    copy.__package__ = 'fastai_bs_finder'
    before = result(*known)
    keep_result(rec, 'bs_result', before)
    properties = {k: vars(Recorder)[k] for k in ('bs_result', 'noise_scale_result', 'bs_sweep_result')}
    try:
        exec(compile(Path(result_module.__file__).read_text(), 'copy', 'exec'), vars(copy))
        assert rec.bs_result is before
        after = result(*known)
        keep_result(rec, 'bs_result', after)
        assert rec.bs_result is after
    finally:
        for k,v in properties.items(): setattr(Recorder, k, v)

def test_the_recorder_keeps_results_and_forgets_with_it():
    rec = Recorder()
    assert rec.bs_result is rec.noise_scale_result is rec.bs_sweep_result is None
    keep_result(rec, 'bs_result', result(*known))
    seen = weakref.ref(rec.bs_result)
    gc.collect()
    assert seen() is rec.bs_result and 'bs_result' not in vars(rec)
    del rec
    gc.collect()
    assert seen() is None


def test_of_a_mock_training():
    learn = digits_learner()
    with learn.no_bar(), learn.no_logging(): sug = learn.bs_find(.1, 100, 5, n_train=3, show_plot=False, profile=False)
    r = learn.recorder.bs_result
    assert r.stats is learn.recorder.bs_stats and r.table is learn.recorder.bs_table and r.suggested == sug._asdict()
    assert not r.stats.attrs and not r.table.attrs and type(r.table) is pd.DataFrame
    assert (r.run.bs, r.run.n, r.run.lr, r.run.n_batch, r.run.n_train, r.run.num_it, r.run.beta, r.run.stopped) == (16, 1500, .1, 5, 3, 100, .9, '')
    assert r.profile == Profile() and 2 < r.run.first_loss < 2.6
