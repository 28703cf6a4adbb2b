"""Search texts through a server of OpenAI's embeddings API (vllm serve OUT, …): pip install openai numpy

python examples/openai_search.py texts.txt "a question" --base-url http://localhost:8000/v1
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import openai


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", type=Path, help="a text a line; empty lines are left out")
    parser.add_argument("query")
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    parser.add_argument("--prompt", default="", help="what the model reads before a query; a server puts none")
    args = parser.parse_args()
    client = openai.OpenAI(base_url=args.base_url, api_key="none")

    def embed(texts: list[str]) -> np.ndarray:
        return np.array([row.embedding for row in client.embeddings.create(model=model, input=texts).data])

    try:
        texts = [line for line in args.texts.read_text("utf-8").splitlines() if line.strip()]
        model = client.models.list().data[0].id
        index = np.concatenate([embed(texts[i : i + 512]) for i in range(0, len(texts), 512)])  # unit vectors
        scores = index @ embed([args.prompt + args.query])[0]
    except (openai.OpenAIError, OSError, ValueError) as error:
        sys.exit(f"no search of {args.texts} through {args.base_url}: {error}; is a server running there?")
    print(f"{len(texts):,} texts, {model}")
    for row in scores.argsort()[::-1][:5]:
        print(f"{scores[row]:.3f}  {texts[row]}")


if __name__ == "__main__":
    main()
