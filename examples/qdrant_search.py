"""python examples/qdrant_search.py texts.jsonl "a question" --model my-embedder -o index (pip install qdrant-client)"""

import argparse
from pathlib import Path

from qdrant_client import QdrantClient
from qdrant_client.models import Distance, VectorParams

import mlpool
from mlpool.corpus.text_files import find_columns, read_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", type=Path, help="a file that mlpool encode reads")
    parser.add_argument("query")
    parser.add_argument("--model", required=True, help="a folder that mlpool saved, or a name on the Hub")
    parser.add_argument("-o", "--output", required=True, help="the folder of the index, made anew")
    args = parser.parse_args()
    try:
        texts = [row.text for row in read_file(args.texts, find_columns([args.texts]))]
        model = mlpool.load(args.model)
        client = QdrantClient(path=args.output)
        client.delete_collection("texts")
        size = model.get_embedding_dimension()
        client.create_collection("texts", VectorParams(size=size, distance=Distance.COSINE))
        client.upload_collection("texts", model.encode_document(texts), [{"text": text} for text in texts])
        found = client.query_points("texts", model.encode_query(args.query), limit=5).points
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: another process has the folder open
        raise SystemExit(f"no search: {error}") from None
    print(f"{client.count('texts').count:,} texts in {args.output}")
    for point in found:
        print(f"{point.score:.3f}  {point.payload['text']}")


if __name__ == "__main__":
    main()
