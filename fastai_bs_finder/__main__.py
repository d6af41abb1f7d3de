"`python -m fastai_bs_finder`: see `fastai_bs_finder.demo`"
import sys
from .demo import main

sys.exit(main())
