"What is said of a result"
import math, re

import matplotlib.pyplot as plt, pytest
from hypothesis import given, strategies as st

from fastai_bs_finder.all import *
from fastai_bs_finder.demo import digits_learner
from fastai_bs_finder.result import Race, keep_result
from fastai_bs_finder.words import as_lr
from fastai.learner import Recorder
from results import result

inf,nan = math.inf,math.nan
linear = {b: .004 + 2e-5*b for b in (16, 64, 256, 1024)}   # seconds: half of the throughput at 200 examples
known = (350, 300, 400),(400, 300, 500),(450, 350, 600)


def small(*rows, n=1500, bs=16, **facts): return result(*rows, n=n, bs=bs, **facts)


race = Race([64, 192], [100, 60], 1.23, [.47, .41], [0, .01])
lost = Race([64, 192], [100, 60], 1.23, [.41, .47], [0, .01])


@pytest.mark.parametrize('found,bs,words', [
    (small((90, nan, nan), (95, 60, 130), (100, 80, 130)), 96, 'is 100 examples (95% interval 80 to 130), measured with bs=16 at lr=0.1.'),
    (small(*[(15, 10, 20)]*3), 16, 'Stay with bs=16: the noise scale is close to it; larger'),
    (small(*[(99, 80, 120)]*3, bs=100), 96, 'Stay with bs=100: the noise scale is close to it; larger'),
    (small(*[(500_000, 400_000, 600_000)]*3, bs=1024), 1024, 'Stay with bs=1024: no larger batch fits, in memory or in an epoch.'),
    (small(*[(500_000, 400_000, 600_000)]*3, bs=1), 1024, 'A larger batch would save more steps, but the training set has only 1,500 examples.'),
    (small(*[(90, nan, nan)]*30, beta=0.), 96,
     'is about 90 examples, measured with bs=16 at lr=0.1; beta=0.0 keeps too few of the 30 measurements to say how sure that is.'),
    (small(*[(90, nan, nan)]*30, beta=0.), 96, 'Stay with bs=16 for now; to learn more, ask again with beta=0.9.'),
    (small(*[(-90, nan, nan)]*30, beta=0.), None, 'is not known yet'),
    (small(*[(90_000, 70_000, 110_000)]*3), 1024, 'is 90,000 examples'),
    (small(*[(90_000, 70_000, 110_000)]*3, n=None), 98304, 'Stay with bs=16, or try bs=98304 at lr≈'),
    (small(*[(700, 100, inf)]*3), 96, 'is at least 100 examples (95% sure)'),
    (small(*[(-700, 0, inf)]*3), None, 'ask again with num_it=400 or n_batch=40.'),
    (small(*[(-700, 0, inf)]*30), None, 'for now; to learn more, ask again with n_batch=40.'),
    (small(*[(700, .5, inf)]*30, bs=64), None, 'to learn more, ask again with n_batch=23.'),
    (small(*[(700, .5, inf)]*30, bs=150), None, 'to learn more, ask again with beta=0.975 and num_it=400.'),
    (small(*[(700, 12, inf)]*3), 12, 'Stay with bs=16 for now; to learn more, ask again with num_it=400'),
    (small(*[(700, 0, inf)]*3), None, 'cannot be told yet'),
    (small(*[(-700, nan, nan)]*3), None, 'is negative, and not by chance; either the training set is fitted'),
    (small(*[(-700, nan, nan)]*3), None, 'Stay with bs=16 for now; to learn more, shuffle the training data if they are in order.'),
    (small((90, nan, nan)), 96, 'Stay with bs=16 for now; to learn more, ask again with num_it=200.'),
    (small((90, nan, nan)), 96, '1 measurement is too few to say how sure that is.'),
    (small((90, nan, nan), suggest=(critical,)), 96, 'Stay with bs=16 for now (bs=96 is a guess); to learn more'),
    (small((-90, nan, nan), (-80, nan, nan)), None, 'is not known yet'),
    (small(*[(900, 700, 1100)]*3, biased=True), 1024, 'Stay with bs=16: this noise scale is biased, since the optimizer stepped after every batch: for comparison only.'),
    (small(), None, 'Stay with bs=16 for now; to learn more, ask again with num_it=200.'),
    (small(missing='no gradient'), None, 'No measurement of 10 batches was completed: no batch gave a gradient.'),
    (small(missing='ended'), None, 'Stay with bs=16 for now; to learn more, ask again with n_batch=5.'),
    (small(*[(100, 80, 130)]*3, stopped='loss', spent=61), 96, 'Lower lr, then ask again: the loss was not finite after 61 of 100 batches, at lr=0.1.'),
    (small(stopped='first loss', spent=1), None, 'Look for missing or infinite values in the data: the loss was not finite before the first step.'),
    (small(*[(100, 80, 130)]*3, lr=0), 96, 'Ask again with the lr that you train with: nothing was trained with lr=0'),
    (small(*[(100, 80, 130)]*3, first_loss=.3), 96, 'Lower lr, then ask again: the training loss rose from 0.3 to 1, at lr=0.1.'),
    (small(*[(100, 80, 130)]*3, loss='between'), None, 'Try some batch sizes with learn.bs_sweep(): what an example adds'),
    (small(*[(100, 80, 130)]*3, mixed=True), None, 'Measure each network by itself, with the parameters of the other one frozen: this learner trains two networks'),
    (small(*[(100, 80, 130)]*3, alike=True), None, 'Shuffle the training data, then ask again: the training loader does not draw its batches at random.'),
])
def test_of_the_noise_scale(found, bs, words):
    said = str(found)
    assert critical(found) == bs and words in said
    assert not re.search(r'-\d', said) and 'nan' not in said and 'inf' not in said.replace('infinite', '')


@pytest.mark.parametrize('found,words', [
    (result(*known, step_time=linear, max_bs=3000), "Train with bs=192 at lr≈0.23 for 4 epochs instead of 3: about 0.66 of the time of bs=64.\n"),
    (result(*known, step_time=linear, n_epoch=30), "Train with bs=192 at lr≈0.23 for 39 epochs instead of 30: about 0.64 of the time of bs=64.\n"),
    (result(*[(3000, 900, 9000)]*3, step_time={64: .01, 256: .01}, suggested=dict(fastest=256)), "Train with bs=256 at lr≈0.38 for 3 epochs, as with bs=64: about 0.25 of the time.\n"),
    (result(*known, step_time=linear), "measured with bs=64 at lr=0.1. Batch sizes from 192 to 512 are about as fast (within 10%)."),
    (result(*[(100, 17, 120)]*3, step_time=linear, enough='clear'), "Stay with bs=64: bs=128 may take 0.86 of the time, or at worst 1.1 times as long.\n"),
    (result(*known, step_time=linear, enough='clear', spent=120), "are about as fast (within 10%). After 120 batches the choice was clear."),
    (result(*known, step_time=linear, enough='cost'), "More batches would have cost more than they could save."),
    (result(*[(600, 200, inf)]*3, step_time=linear), "This choice may take up to 24% longer than the best one: to learn more, ask again with num_it=400 or n_batch=40"),
    (result(*known, step_time=linear, race=race), "In a race of 1.2 s each, bs=192 reached a loss of 0.41, bs=64 a loss of 0.47."),
    (result(*known, step_time=linear, race=lost), "Stay with bs=64: in a race of 1.2 s each, bs=192 reached a loss of 0.47, bs=64 a loss of 0.41.\n"),
    (result(*[(6, 5, 7)]*3, step_time=linear), "Stay with bs=64: no other batch size should be much faster here (bs=32: 0.97 of the time).\n"),
    (result(*[(300, 10, 9000)]*3, step_time=linear), "Stay with bs=64 for now: bs=256 may take 0.66 of the time, or at worst 1.6 times as long; to learn more, ask again with num_it=400 or n_batch=40.\n"),
    (result(*[(300, 10, 9000)]*3, step_time=linear, enough='cost'), "at worst 1.6 times as long; more batches would cost more than they could save.\n"),
    (result(*[(100, 17, 120)]*3, step_time=linear), "Stay with bs=64 for now: bs=128 may take 0.86 of the time, or at worst 1.1 times as long; to learn more"),
    (result(*known), "Stay with bs=64, or try bs=512 at lr≈0.41 for 6 epochs instead of 3: about 0.25 of the steps of bs=64.\n"),
    (result(*known, trouble='ignored'), "The speed of other batch sizes on this machine is not known: the training loader does not take another batch size."),
    (result(*known, trouble='failed', failed=256, error='no such size'), "is not known: a step with bs=256 fails (no such size)."),
    (result(*known, no_memory='ValueError: odd'), "What fits in memory is not known: ValueError: odd."),
    (result(*known, step_time=linear, max_bs=200), "Only about 200 examples fit in memory; larger steps, which set_bs accumulates, save no time."),
    (result(*known, max_bs=200), "A larger batch would save more steps, but only about 200 examples fit in memory: accumulate the gradients of several, as set_bs does."),
    (result(*known, bs=16, capped=True, max_bs=16, min_bs=16, unfit='shape'), "Stay with bs=16: no larger batch works in one piece.\n"),
    (result(*known, bs=16, capped=True, max_bs=16, min_bs=16, unfit='shape'), "\nOnly batches of 16 examples work here, other sizes fail (shape)"),
    (result(*known, step_time=linear, cut_short=True), "Larger batches may be faster still, but there was no time to try them: ask again with profile=2."),
    (result(*known, step_time=linear, timings={64: [1, 1, 2, 2., 2.5, 3]}, cut_short=True), "\nStep times are known only to within 21%, perhaps because other programs are running: ask again when they are not."),
    (result(*known, step_time=linear, lr_given=slice(.01, .1)), "at lr≈slice(0.023, 0.23) for"),
    (result(*known, step_time=linear, loss='sum'), "at lr≈0.078 for 4 epochs instead of 3"),
    (result(*known, step_time=linear, suggested=dict(mine=8)), "Train with bs=8 at lr≈0.014 for 2 epochs instead of 3: about 4.2 times the time of bs=64.\n"),
    (result(*[(300, 10, 9000)]*3, step_time=linear, suggested=dict(mine=256)), "Train with bs=256 at lr≈0.26 for 5 epochs instead of 3: about 0.72 of the time (0.44 to 1.6) of bs=64.\n"),
    (result(*known, suggested=dict(mine=70)), "Train with bs=70 at lr≈0.11 for 3 epochs, as with bs=64: about 0.91 of the steps.\n"),
    (result(*known, suggested=dict(mine=64)), "Stay with bs=64.\n"),
    (result(*known, suggested=dict(mine=10**6)), "Choose less than bs=1000000, which is more than the 50,000 examples of the training set.\n"),
    (result(*[(-50, 0, inf)]*3, suggested=dict(mine=80)), "Stay with bs=64 for now (bs=80 is a guess); to learn more"),
])
def test_of_the_advice(found, words):
    said = str(found)
    assert words in said + '\n' and 'nan' not in said and 'inf' not in said


@pytest.mark.parametrize('facts', [dict(lr=0), dict(biased=True)])
def test_a_number_that_is_no_advice_is_said_too(facts): assert '\nThe noise scale is 450 examples' in str(result(*known, **facts))


def test_steps_are_those_of_the_plan():
    "A hundred at least, which here are more than twice as many epochs as the size is worth"
    assert str(small(*known, suggested=dict(mine=192))).startswith('Stay with bs=16: a training with bs=192 would have too few steps.')


def test_of_several_processes():
    assert 'num_it=200 or n_batch=2.' in str(result((400, nan, nan), processes=4))
    assert 'n_batch' not in str(result((400, nan, nan)))
    few = str(result(*known, bs=60, processes=4, step_time={60: .01, 250: .011}))
    assert 'bs=60 (4 processes × 15)' in few and 'Train with bs=192 (4 processes × 48) at' in few
    assert 'bs=64 (3 processes × 22, 66 in all)' in str(result(*known, bs=64, processes=3))
    assert 'before the first step (rank 2).' in str(result(processes=4, stopped='first loss', stopped_by=2))


sizes = st.none() | st.integers(1, 3000) | st.just(nan)
ends = st.floats(0, 1e5) | st.sampled_from([nan, inf])


@st.composite
def results(draw):
    "Of measurements, times, memory and suggestions of all kinds; some suggestions are those of the package"
    rows = draw(st.lists(st.tuples(st.floats(.5, 1e5), st.floats(0, 1), st.sampled_from([nan, inf]) | st.floats(1, 10)), min_size=1, max_size=5))
    rows = [(x, nan if math.isnan(w) else x*lo, w*x) for x,lo,w in rows]
    facts = dict(bs=draw(st.sampled_from([1, 16, 55, 64, 1000])), n=draw(st.none() | st.integers(1000, 10**5)), max_bs=draw(st.none() | st.integers(1, 10**4)),
                 step_time=draw(st.sampled_from([{}, linear, {64: .01, 256: .0101}])), batch_norm=draw(st.booleans()))
    found = result(*rows, **facts)
    if draw(st.booleans()): return found
    mine = draw(st.dictionaries(st.sampled_from(['mine', 'yours', 'cautious', 'critical', 'fastest']), sizes, min_size=1))
    return found.changed(suggested=mine)


imperatives = 'Train with bs=', 'Stay with bs=', 'Choose less than', 'Lower lr', 'Look for', 'Ask again', 'Shuffle', 'Try some', 'Measure each'


@given(results())
def test_sentence_tuple_picture_and_set_bs_name_the_same_size(found):
    said,advised,bs0 = str(found),found.advised,found.run.bs
    first,*more = said.splitlines()
    assert first.startswith(imperatives) and len(more) <= 2 and not any(l.startswith(imperatives) for l in more), said
    assert all(l.endswith('.') for l in (first, *more)) and 'nan' not in said and 'inf' not in said and '..' not in said, said
    trained = [int(v) for v in re.findall(r'Train with bs=(\d+)', first)]
    assert trained == [advised] if trained else advised in (None, bs0) or 'Choose' in first or 'for now' in first or 'too few steps' in first or found.suggested.get('critical') == advised, said
    if 'fastest' in found.suggested and first.startswith('Stay') and found.in_use.hi.iloc[-1] > 0: assert advised in (None, bs0) or found.step_time is None, said
    fig,axs = plt.subplots(1, 2)
    recorder = Recorder()
    keep_result(recorder, 'bs_result', found)
    for ax,panel in zip(axs, ('noise', 'gain')):
        recorder.plot_bs_find(ax, panel)
        if advised and ax.get_legend(): assert any(t.get_text().endswith(f': {advised}') and not t.get_text().startswith('in use') for t in ax.get_legend().get_texts())
    plt.close(fig)
    if advised and found.table is not None: assert advised in found.table.index or advised > found.table.index[-1]
    learn = digits_learner(bs=16)
    with learn.no_logging():
        if (advised or 0) <= 1500 and (advised or 'fastest' in found.suggested): assert learn.set_bs(found).dls.bs == (advised or 16)
        else:
            with pytest.raises(ValueError, match='There is no batch size in|more than the 1,500 examples'): learn.set_bs(found)


@pytest.mark.parametrize('row,regret,said', [((412.3, 300, 500), None, 'noise scale 412'), ((412.3, 300, 500), .234, 'noise scale 412, choice within 23% of the best'),
                                             ((412.3, 300, inf), .5, 'noise scale at least 300, choice within 50% of the best'), ((412.3, .5, inf), .5, ''), ((412.3, nan, nan), .5, ''),
                                             ((412.3, 300, 500), 1e9, 'noise scale 412'), ((412.3, 300, 500), nan, 'noise scale 412')])
def test_the_comment_beside_the_progress_bar(row, regret, said):
    assert noise_scale_so_far(dict(zip(('opt_noise_scale', 'opt_lo', 'opt_hi'), row)), regret) == said


def test_how_many_epochs_was_set(capsys):
    plan = set_bs_summary(64, 1, 1, 24, plan=(1, 2, slice(.01, .1)))
    assert plan == 'Batches of 64 examples, 24 steps per epoch. To get as far as in 1 epoch at the old size, train for 2 at lr≈slice(0.01, 0.1): learn.fit_one_cycle(*learn.bs_plan(1))'


def test_the_table_reads_well():
    found = result(*known, step_time=linear, max_bs=3000)
    text = found.table_as_text().to_string()
    assert '64 (in use)' in text and 'accumulate 2' in text and '_lo' not in text
    row = next(l for l in text.splitlines() if l.startswith('512 '))
    assert row.split()[1:3] == ['0.25', '(0.23-0.27)']
    assert 'nan' not in result(*known).table_as_text().to_string() and result((-50, 0, inf)).table_as_text() is None


def test_a_notebook_shows_sentence_table_and_picture():
    html = result(*known, step_time=linear)._repr_html_()
    assert '<p>Train with bs=192 at' in html and '</p><p>The noise scale' in html and '64 (in use)' in html and '<img src="data:image/png;base64,' in html
    assert 'No measurement of 10 batches' in result()._repr_html_() and '<img' not in result()._repr_html_()


@pytest.mark.parametrize('lr,text', [(.00123, '0.0012'), (slice(1e-4, .1), 'slice(0.0001, 0.1)'), ([.1, .2], '[0.1, 0.2]')])
def test_learning_rates(lr, text): assert as_lr(lr) == text
