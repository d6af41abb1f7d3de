"Everything, in one import: `from fastai_bs_finder.all import *`"
from .noise import *
from .metric import *
from .snapshot import *
from .memory import *
from .predict import *
from .result import *
from .suggest import *
from .words import *
from .plot import *
from .measure import *
from .finder import *
from .accumulate import AccumulateGrads
from .set_bs import *
from .track import *
from .sweep import *
