"""Search a code base on a page: a Hub Space, or any machine (`python app.py`).

What is served is said by environment variables, on a Space by its settings:

MOSE_INDEX: what `mose index` wrote: a folder (default: `index` beside this file), s3://… or qdrant:NAME@URL.
MOSE_CHECKPOINT: the checkpoint of the index, a folder or a repository of the Hub (default: `model` beside this file, or
    else the one that the index names).
MOSE_SOURCE: the indexed folder in a repository at a revision, for links from hits, such as
    https://github.com/OWNER/NAME/blob/REVISION/src (default: no links where the files aren't here).
"""

import os
from pathlib import Path

from modular_star_encoder.demo import serving
from modular_star_encoder.search.index import CodeIndex

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    checkpoint = os.environ.get("MOSE_CHECKPOINT") or (str(HERE / "model") if (HERE / "model").is_dir() else None)
    index = CodeIndex.open(os.environ.get("MOSE_INDEX") or HERE / "index")
    serving.serve(index, checkpoint=checkpoint, host=None, source=os.environ.get("MOSE_SOURCE"))
