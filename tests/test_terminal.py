"bs_find as the user of a terminal sees it, 80 columns wide: what is compared is what a terminal emulator shows"
import os, re, signal, sys, time
from pathlib import Path

import pytest
pexpect = pytest.importorskip('pexpect', reason='needs pexpect')
pyte = pytest.importorskip('pyte', reason='needs pyte, a terminal emulator')

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == 'win32', reason='needs a pseudo-terminal')]
tests = Path(__file__).parent
shells = dict(python=['-q'], ipython=['-m', 'IPython', '--no-banner', '--no-confirm-exit', '--colors=nocolor'])
progress = re.compile(r' \|█*-*\| [\d.]+% \[(\d+)/\d+ .*\]')


class Terminal:
    "A shell in a pseudo-terminal"
    rows,cols = 1000,80
    def __init__(self, shell, env):
        self.shell,self.screen,self.printed,self.seen = shell,pyte.Screen(self.cols, self.rows),'',[]
        self.stream = pyte.Stream(self.screen)
        self.process = pexpect.spawn(sys.executable, shells[shell], env=env, dimensions=(self.rows, self.cols), encoding='utf-8')
        self.screen.write_process_input = self.process.send  # a terminal answers when it is asked where its cursor is

    def row(self, y): return ''.join(self.screen.buffer[y][x].data for x in range(self.cols)).rstrip()

    @property
    def now(self): return self.row(self.screen.cursor.y)

    def at_prompt(self): return re.fullmatch(r'>>>|In \[\d+\]:', self.now)

    def read(self, until, seconds=60):
        "Read until there is a reason to stop, and note the row of the cursor whenever it may have changed"
        end = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < end, '\n'.join(map(self.row, range(self.screen.cursor.y + 1)))
            try: text = self.process.read_nonblocking(2**16, timeout=.2)
            except pexpect.TIMEOUT: continue
            self.printed += text
            for part in re.split(r'(?<=[\r\n\]])', text):
                self.stream.feed(part)
                self.seen.append((self.screen.cursor.y, self.now))

    def type(self, line, until=None):
        "Type a line; the rows of what it prints, when it is done or `until` says so"
        self.read(self.at_prompt)
        top,self.start,self.printed,self.seen = self.screen.cursor.y,None,'',[]
        def echoed():
            ends = (y for y in range(top, self.screen.cursor.y) if ''.join(map(self.row, range(top, y + 1))).endswith(line))
            self.start = next((y + 1 for y in ends), None)
            return self.start
        self.process.send(line + '\r')
        self.read(echoed)
        self.read(until or self.at_prompt)
        return self.shown()

    def shown(self): return [o for o in map(self.row, range(self.start, self.screen.cursor.y)) if o]

    def interrupt(self):
        self.process.sendintr()
        self.read(self.at_prompt)
        return self.shown()


@pytest.fixture(scope='module', params=shells)
def terminal(request, tmp_path_factory):
    "A shell in which the README's first lines were typed"
    if request.param == 'ipython': pytest.importorskip('IPython', reason='needs IPython')
    home = tmp_path_factory.mktemp(request.param)
    env = {k: v for k,v in os.environ.items() if k not in ('MPLBACKEND', 'PYTHONSTARTUP', 'COLUMNS', 'LINES')}
    env |= dict(HOME=str(home), IPYTHONDIR=str(home), TERM='xterm', LC_ALL='C.UTF-8', PYTHONWARNINGS='ignore', OMP_NUM_THREADS='1', PYTHON_BASIC_REPL='1', PYTHONPATH=f'{tests.parent}{os.pathsep}{tests}')
    terminal = Terminal(request.param, env)
    try:
        terminal.type('from fastai.tabular.all import *')
        terminal.type('from fastai_bs_finder.all import *')
        terminal.type('from fastai_bs_finder.demo import digits_learner')
        terminal.type('from footprint import *')
        terminal.type('learn = digits_learner()')
        yield terminal
    finally:
        terminal.process.kill(signal.SIGKILL)
        terminal.process.wait()  # as long as a busy machine takes


def unless_mended(request, terminal, shell, why):
    if terminal.shell == shell: request.applymarker(pytest.mark.xfail(strict=True, reason=why))


def test_the_bar_moves_on_one_line_and_makes_room_for_the_answer(terminal, request):
    unless_mended(request, terminal, 'ipython', 'fastcore takes IPython in a terminal for a notebook, so each step of the bar is a line of HTML, in learn.fit as well')
    shown = terminal.type('learn.bs_find(lr=.1, num_it=2000, regret=0)')
    bars = [(y, int(m[1])) for y,row in terminal.seen if (m := progress.fullmatch(row))]
    values = [value for _,value in bars]
    assert {y for y,_ in bars} == {terminal.start}
    assert values == sorted(values) and values[0] == 0 and values[-1] == 2000 and len(set(values)) > 10
    assert 'noise scale' in terminal.printed and not any('|' in row or '<' in row for row in shown)
    answer = ''.join(shown).replace(' ', '')  # a row may end with a space
    assert answer.startswith(('Trainwith', 'Staywith')) and answer.count('noisescale') == answer.count('SuggestedBS') == 1
    assert re.fullmatch(r'(Out\[\d+\]: )?SuggestedBS\(critical=\d+, fastest=(\d+|None)\)', shown[-1])


def test_no_word_is_broken(terminal):
    terminal.type('learn.bs_find(lr=.1, num_it=200)')
    printed = re.sub(r'\x1b\[[\d;?]*[A-Za-z]', '', terminal.printed)
    said = re.search('(?:Train|Stay) with.*?(?=(Out.*)?SuggestedBS)', printed, re.DOTALL)[0]
    assert max(map(len, said.splitlines())) <= terminal.cols


def test_ctrl_c_leaves_the_learner_as_it_was(terminal):
    terminal.type('learn = digits_learner()')
    terminal.type('was = state(learn)')
    terminal.type('learn.bs_find(lr=.1, num_it=100000, regret=0)', until=lambda: re.search(r'\[\d{4,}/100000', ''.join(terminal.shown()) + terminal.now))
    shown = terminal.interrupt()
    assert shown[-1].startswith('KeyboardInterrupt') and not any(map(progress.fullmatch, shown))
    assert terminal.type('print(changes(was, state(learn)))') == ['[]']
    assert re.match(r'epoch +train_loss', terminal.type('learn.fit(1, .1)')[0]) or terminal.shell == 'ipython'  # a table in HTML
    terminal.type('after,other = trained(learn),digits_learner()')
    terminal.type('other.fit(1, .1)')
    assert terminal.type('print(same(after, trained(other)))') == ['True']
    terminal.type('found = learn.bs_find(.1, 600, regret=0).critical')
    assert terminal.type('print(found == other.bs_find(.1, 600, regret=0).critical)')[-1] == 'True'
