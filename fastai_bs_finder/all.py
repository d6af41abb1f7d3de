"Everything, in one import: `from fastai_bs_finder.all import *`"
from .noise import *
from .geometry import *
from .snapshot import *
from .memory import *
from .predict import *
from .suggest import *
from .plot import *
from .layers import *
from .finder import *
from .accumulate import *
from .set_bs import *
from .track import *
from .grow import *
from .sweep import *
