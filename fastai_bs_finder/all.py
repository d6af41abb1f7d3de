"Everything, in one import: `from fastai_bs_finder.all import *`"
from .noise import *
from .snapshot import *
from .suggest import *
from .plot import *
from .finder import *
from .memory import *
