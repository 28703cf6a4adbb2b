"""python examples/lancedb_search.py texts.jsonl "a question" --model my-embedder -o index  (pip install lancedb)"""

import argparse
from pathlib import Path

import lancedb

import mlpool
from mlpool.corpus.text_files import find_columns, read_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", type=Path, help="a file that mlpool encode reads")
    parser.add_argument("query")
    parser.add_argument("--model", required=True, help="a folder that mlpool saved, or a name on the Hub")
    parser.add_argument("-o", "--output", required=True, help="the folder of the index, whose texts are replaced")
    args = parser.parse_args()
    try:
        texts = [row.text for row in read_file(args.texts, find_columns([args.texts]))]
        model = mlpool.load(args.model)
        rows = [{"text": text, "vector": v} for text, v in zip(texts, model.encode_document(texts), strict=True)]
        table = lancedb.connect(args.output).create_table("texts", rows, mode="overwrite")
        found = table.search(model.encode_query(args.query)).distance_type("cosine").limit(5).to_list()
    except (OSError, ValueError, RuntimeError) as error:
        raise SystemExit(f"no search: {error}") from None
    print(f"{table.count_rows():,} texts in {args.output}")
    for row in found:
        print(f"{1 - row['_distance']:.3f}  {row['text']}")


if __name__ == "__main__":
    main()
