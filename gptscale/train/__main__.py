"""One rank of a training run: `python -m gptscale.train …`, under any launcher."""

import sys

from gptscale.train.worker import main

sys.exit(main(sys.argv[1:]))
