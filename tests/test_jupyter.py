"bs_find as the user of a notebook sees it: JupyterLab in a browser, and notebooks that nobody watches"
import json, os, re, shutil, subprocess, sys, time
from contextlib import suppress
from pathlib import Path

import nbformat, psutil, pytest
from nbformat.v4 import new_code_cell, new_notebook

from fastai_bs_finder import finder
from fastai_bs_finder.demo import digits_learner

tests = Path(__file__).parent
tutorial = tests.parent/'nbs/index.ipynb'
(make,find),answer = [o.source for o in nbformat.read(tutorial, 4).cells if o.cell_type == 'code'][:2],'sug'
chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
flags = '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync'


@pytest.fixture(scope='module')
def env(tmp_path_factory):
    "The environment of a newcomer: no settings, no history"
    home = tmp_path_factory.mktemp('home')
    folders = {f'{name}_DIR': str(home/name) for name in ('JUPYTER_CONFIG', 'JUPYTER_DATA', 'JUPYTER_RUNTIME')} | dict(HOME=str(home), IPYTHONDIR=str(home/'ipython'))
    inherited = {k: v for k,v in os.environ.items() if k != 'MPLBACKEND'}
    return inherited | folders | dict(PYTHONPATH=f'{tests.parent}{os.pathsep}{tests}', PYTHONWARNINGS='ignore', OMP_NUM_THREADS='1', NO_PROXY='127.0.0.1')


def end(process):
    "End a process and all that it started, whatever the state it is in"
    family = [process, *process.children(recursive=True)]
    process.terminate()
    for o in psutil.wait_procs(family, timeout=10)[1]: o.kill()


@pytest.fixture(scope='module')
def lab(env, tmp_path_factory):
    "The address of a JupyterLab that asks for no token and fetches no news"
    pytest.importorskip('jupyterlab', reason='needs JupyterLab')
    folder,config = tmp_path_factory.mktemp('lab'),Path(env['JUPYTER_CONFIG_DIR'])
    nbformat.write(new_notebook(cells=[new_code_cell()], metadata=dict(kernelspec=dict(name='python3', display_name='Python 3'))), folder/'a.ipynb')
    config.mkdir()
    (config/'jupyter_lab_config.json').write_text(json.dumps(dict(
        ServerApp=dict(ip='127.0.0.1', port=0, open_browser=False, allow_root=True, root_dir=str(folder)), IdentityProvider=dict(token=''),
        LabApp=dict(news_url=None, check_for_updates_class='jupyterlab.NeverCheckForUpdate', extension_manager='readonly'))))
    (config/'labconfig').mkdir()
    (config/'labconfig/page_config.json').write_text(json.dumps(dict(disabledExtensions={'@jupyterlab/apputils-extension:announcements': True})))
    with open(folder/'log.txt', 'w') as log: process = psutil.Popen([sys.executable, '-m', 'jupyterlab'], cwd=folder, env=env, stdout=log, stderr=log)
    try:
        last = time.monotonic() + 60
        while not (started := list(Path(env['JUPYTER_RUNTIME_DIR']).glob('jpserver-*.json'))):
            assert process.poll() is None and time.monotonic() < last, (folder/'log.txt').read_text()
            time.sleep(.1)
        yield json.loads(started[0].read_text())['url']
    finally: end(process)


class Notebook:
    "A notebook in a browser, with a kernel of its own"
    def __init__(self, page, url):
        self.page = page
        page.set_default_timeout(60_000)
        page.goto(f'{url}lab/tree/a.ipynb?reset')
        self.wait_for('() => /\\| Idle/.test(document.querySelector("#jp-main-statusbar")?.textContent)')

    def wait_for(self, js, arg=None): self.page.wait_for_function(js, arg=arg)

    def type(self, code):
        "Type into the cell at the bottom"
        cell = self.page.locator('.jp-Notebook .jp-CodeCell').last
        cell.locator('.cm-content').click()
        self.page.keyboard.insert_text(code)
        return cell

    def start(self, code):
        "Run a new cell"
        n = self.page.locator('.jp-Notebook .jp-CodeCell').count()
        self.type(code)
        self.page.keyboard.press('Shift+Enter')
        self.wait_for('n => document.querySelectorAll(".jp-Notebook .jp-CodeCell").length > n', n)
        return Cell(self, n - 1)

    def run(self, code): return self.start(code).done()


class Cell:
    def __init__(self, notebook, i): self.notebook,self.cell = notebook,notebook.page.locator('.jp-Notebook .jp-CodeCell').nth(i)

    def done(self):
        "Wait for its end, and until the browser has drawn the pictures"
        prompt = self.cell.locator('.jp-InputPrompt').element_handle()
        self.notebook.wait_for(r'o => /\[\d+\]/.test(o.textContent)', prompt)
        self.notebook.page.locator('.jp-Notebook-ExecutionIndicator[data-status=idle]').wait_for()
        self.notebook.wait_for('o => [...o.querySelectorAll("img")].every(i => i.complete && i.naturalWidth)', self.cell.element_handle())
        return self

    @property
    def outputs(self):
        "What can be seen under the cell, from top to bottom: texts, and pictures"
        shown = []
        for o in self.cell.locator('.jp-OutputArea-child').all():
            if not o.bounding_box()['height']: continue  # fastprogress leaves its style sheet and the place of its bar, of no height
            shown.append('picture' if o.locator('img').count() else o.locator('.jp-OutputArea-output').text_content())
        return shown


@pytest.fixture(scope='module')
def notebook(lab, tmp_path_factory):
    "A notebook in which the README's first lines were run"
    playwright = pytest.importorskip('playwright.sync_api', reason='needs playwright')
    if not chromium: pytest.skip('needs Chromium')
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch_persistent_context(tmp_path_factory.mktemp('profile'), executable_path=chromium, args=flags.split(), viewport=dict(width=1200, height=1000))
        try:
            notebook = Notebook(browser.pages[0], lab)
            assert notebook.run(make).outputs == []
            yield notebook
        finally: browser.close()


# each state that the page goes through, not only those that happen to be looked at
watch = """() => {
    window.seen = []
    new MutationObserver(() => {
        window.seen.push([...document.querySelectorAll('.jp-Notebook progress')].map(o => [o.value, o.parentElement.textContent]))
    }).observe(document.body, {childList: true, subtree: true, attributes: true, characterData: true})
}"""


def is_answer(text):
    text = ' '.join(text.split())
    return text.startswith(('Train with', 'Stay with')) and text.count('noise scale') == 1

def is_suggestion(text): return re.fullmatch(r'SuggestedBS\(critical=\d+, fastest=(\d+|None)\)', text)


@pytest.mark.slow
def test_a_bar_that_moves_then_the_answer_and_the_picture(notebook):
    notebook.page.evaluate(watch)
    said,picture = notebook.run('sug = learn.bs_find(lr=.1, num_it=600, regret=0)').outputs
    assert is_answer(said) and picture == 'picture'
    seen = notebook.page.evaluate('window.seen')
    values = [bars[0][0] for bars in seen if bars]
    assert max(map(len, seen)) == 1 and values == sorted(values) and len(set(values)) > 5 and values[-1] == 600
    assert any('noise scale' in bars[0][1] for bars in seen if bars) and seen[-1] == []
    sug, = notebook.run(answer).outputs
    assert is_suggestion(sug)


@pytest.mark.slow
def test_as_the_value_of_a_cell(notebook):
    said,value,picture = notebook.run('learn.bs_find(lr=.1, num_it=100)').outputs
    assert is_answer(said) and value.startswith('SuggestedBS(') and picture == 'picture'
    assert notebook.run('learn.recorder.plot_bs_find()').outputs == ['picture']
    assert notebook.run('fig = learn.recorder.plot_bs_find()').outputs == ['picture']
    assert notebook.run('plt.get_fignums()').outputs == ['[]']


@pytest.mark.slow
def test_no_word_is_broken(notebook):
    text = notebook.run('learn.bs_find(lr=.1, num_it=100, show_plot=False);').cell.locator('.jp-RenderedText pre').first
    broken = text.evaluate("""o => {
        const node = document.createTreeWalker(o, NodeFilter.SHOW_TEXT).nextNode(), range = document.createRange()
        return [...node.data.matchAll(/\\S+/g)].filter(m => {
            range.setStart(node, m.index)
            range.setEnd(node, m.index + m[0].length)
            return new Set([...range.getClientRects()].map(r => r.top)).size > 1
        }).map(m => m[0])
    }""")
    assert broken == []


@pytest.mark.slow
def test_tab_and_question_mark(notebook):
    from playwright.sync_api import TimeoutError
    text = notebook.type('learn.bs_f').locator('.cm-content')
    last = time.monotonic() + 60
    while text.text_content() != 'learn.bs_find':  # JupyterLab gives the kernel a second to answer, which the first time is not enough
        assert time.monotonic() < last
        notebook.page.keyboard.press('Tab')
        with suppress(TimeoutError): notebook.page.wait_for_function('o => o.textContent == "learn.bs_find"', arg=text.element_handle(), timeout=3000)
    shown, = notebook.run('?').outputs
    assert 'Launch a mock training to find a good batch size' in shown and 'num_it: int | None = None' in shown
    shown, = notebook.run('learn.bs_find??').outputs
    assert '# Number of batches to spend at most' in shown


@pytest.mark.slow
def test_the_stop_button_leaves_the_learner_as_it_was(notebook):
    notebook.run('from footprint import *\nlearn = digits_learner()\nwas = state(learn)')
    cell = notebook.start('learn.bs_find(lr=.1, num_it=100_000, regret=0)')
    notebook.wait_for('() => document.querySelector(".jp-Notebook progress")?.value > 100')
    notebook.page.locator('[data-command="notebook:interrupt-kernel"], [data-command="kernelmenu:interrupt"]').first.click()
    error, = cell.done().outputs
    assert error.rstrip(': \n').endswith('KeyboardInterrupt') and not cell.cell.locator('progress').count()
    assert notebook.run('changes(was, state(learn))').outputs == ['[]']
    assert 'train_loss' in notebook.run('learn.fit(1, .1)').outputs[0]
    notebook.run('after,other = trained(learn),digits_learner()\nother.fit(1, .1)')
    assert notebook.run('same(after, trained(other))').outputs == ['True']
    said,picture = notebook.run(find).outputs
    assert is_answer(said) and picture == 'picture'


@pytest.mark.slow
def test_a_notebook_that_nobody_watches(env, tmp_path):
    nbformat.write(new_notebook(cells=[new_code_cell(o) for o in (make, find, answer)]), tmp_path/'a.ipynb')
    done = subprocess.run([sys.executable, '-m', 'nbconvert', '--to', 'notebook', '--execute', '--inplace', 'a.ipynb'], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr
    made,found,value = [o.outputs for o in nbformat.read(tmp_path/'a.ipynb', 4).cells]
    html,(said,picture) = [o for o in found if 'text/html' in o.get('data', {})],[o for o in found if 'text/html' not in o.get('data', {})]
    assert made == [] and is_answer(said.text) and list(picture.data) == ['image/png', 'text/plain']
    assert len(html) == 2 and '<style>' in html[0].data['text/html'] and html[1].data['text/html'] == ''  # of the bar
    assert len(value) == 1 and is_suggestion(value[0].data['text/plain'])


def test_a_pause_of_the_machine_does_not_cost_the_times(monkeypatch):
    monkeypatch.setattr(finder, 'least_profile', .5)
    monkeypatch.setattr(finder, 'estimate_memory', lambda learn, bs, seconds: time.sleep(3.1*seconds))
    learn = digits_learner()
    learn.bs_find(lr=.1, num_it=600, show_plot=False)
    assert len(learn.recorder.bs_result.profile.step_time) > 1 and not learn.recorder.bs_result.profile.trouble
