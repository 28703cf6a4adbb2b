"""`mlpool calibrate`: a language model as an embedder, by a sample of texts, without training."""

import argparse
import random
from collections.abc import Iterable
from pathlib import Path

from ..files import check_folder_name
from ..options import add_device, add_max_seq_length, check_place
from .text_files import ACCEPTED, find_columns, find_files, read_file

DESIGN = "multi-layer-causal-mean"  # causal: what reads in both directions must be trained to


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.description = (
        "Make an embedder of a pretrained language model without training: the mix of all its layers, whitened by "
        "texts such as it will embed. A start for mlpool train, too."
    )
    add("inputs", nargs="+", metavar="FILE", help=f"{ACCEPTED}; glob patterns too. A sample of the texts is read")
    add("-m", "--model", required=True, help="a pretrained language model: folder or Hub name")
    add("-o", "--output", required=True, metavar="DIR", help="folder to write the embedder to")
    add("--design", default=DESIGN, help="default: %(default)s")
    add(
        "--text-column", nargs="+", default=[None], metavar="COLUMN",
        help="several, say query positive, if both will be embedded; default: text, else the only string column",
    )  # fmt: skip
    add("--texts", type=int, metavar="N", help="size of the sample; default: 4 times the embeddings' dimension")
    add_max_seq_length(parser)
    add_device(parser, "a GPU if there is one")


def run(args: argparse.Namespace) -> None:
    check_place(args.model)
    check_folder_name(Path(args.output))
    if args.texts is not None and args.texts < 2:
        raise ValueError(f"--texts must be at least 2, got {args.texts}")
    files = find_files(args.inputs)
    columns = [find_columns(files, name) for name in args.text_column]
    from ..embedder import load  # imports for seconds
    from ..embedder.calibration import ENOUGH

    embedder = load(args.model, args.design, max_seq_length=args.max_seq_length, device=args.device)
    wanted = args.texts or ENOUGH * embedder.backbone.hidden_size
    texts = sample((row.text for path in files for column in columns for row in read_file(path, column)), wanted)
    embedder.calibrate(texts, show_progress_bar=True)
    embedder.save(args.output)
    print(f"{args.output}: {args.design} on {args.model}, whitened by {len(texts):,} texts. Embed with mlpool encode")


def sample(texts: Iterable[str], count: int) -> list[str]:
    """At most so many of the texts that are not blank, each as likely as another, the same ones each time."""
    kept: list[str] = []
    draw = random.Random(0)
    for number, text in enumerate(text for text in texts if text.strip()):
        if number < count:
            kept.append(text)
        elif (place := draw.randrange(number + 1)) < count:
            kept[place] = text
    return kept
