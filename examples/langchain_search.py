"""python examples/langchain_search.py texts.txt "a question" --model my-embedder  (pip install langchain-core)"""

import argparse
from pathlib import Path

from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore

import mlpool


class MlpoolEmbeddings(Embeddings):
    def __init__(self, model: mlpool.Embedder) -> None:
        self.model = model

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self.model.encode_document(texts).tolist()

    def embed_query(self, text: str) -> list[float]:
        return self.model.encode_query(text).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", type=Path, help="a text a line; empty lines are left out")
    parser.add_argument("query")
    parser.add_argument("--model", required=True, help="a folder that mlpool saved, or a name on the Hub")
    args = parser.parse_args()
    try:
        texts = [line for line in args.texts.read_text("utf-8").splitlines() if line.strip()]
        store = InMemoryVectorStore.from_texts(texts, MlpoolEmbeddings(mlpool.load(args.model)))
    except (OSError, ValueError) as error:
        raise SystemExit(f"no search: {error}") from None
    for document, score in store.similarity_search_with_score(args.query, k=5):
        print(f"{score:.3f}  {document.page_content}")


if __name__ == "__main__":
    main()
