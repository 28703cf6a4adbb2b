"""Which prompts fit pairs of texts: in the texts' own language, and none where both sides are alike.

A stored prompt is put before every query for good, so nothing is guessed: texts in no language that is known here, or
in several, get none.
"""

import re
from collections import Counter
from collections.abc import Sequence
from statistics import median

# The most frequent function words, which no two of these languages share in their order of frequency.
_WORDS = {
    "English": "the of and to is in that for it with as was on are what how by this which be",
    "German": "der die das und ist nicht ein eine zu den mit von wie auf dem sich wird für was auch",
    "French": "le la les des et est une du que dans pour qui pas sur par au ce comment quel avec",
    "Spanish": "el la los las de y que es en una del por con para se su como qué cuál al",
    "Italian": "il di che è la e un per una non del sono con della come i gli nel si qual",
    "Portuguese": "o de que e do da em um para é com não uma os no se na por como qual",
    "Dutch": "de het een van en is dat niet te zijn op voor met die wat hoe aan door ook wordt",
}
# Scripts that one language has for itself; of Han without kana Chinese is by far the likeliest.
_SCRIPTS = {
    "Japanese": r"[\u3040-\u30ff]", "Korean": r"[\uac00-\ud7af]", "Chinese": r"[\u4e00-\u9fff]",
    "Russian": r"[\u0400-\u04ff]",
}  # fmt: skip
# What is asked of the model where the first text is a question, and where it is another short text.
_TASKS = {
    "English": (
        "Given a question, retrieve passages that answer it", "Given a short text, retrieve its passage", "Query",
    ),
    "German": (
        "Finde zu einer Frage Textstellen, die sie beantworten", "Finde zu einem kurzen Text die Textstelle", "Anfrage",
    ),
    "French": (
        "Trouver les passages qui répondent à une question", "Trouver le passage d'un texte court", "Requête",
    ),
    "Spanish": (
        "Encontrar los pasajes que responden a una pregunta", "Encontrar el pasaje de un texto breve", "Consulta",
    ),
    "Italian": (
        "Trovare i passi che rispondono a una domanda", "Trovare il passo di un testo breve", "Ricerca",
    ),
    "Portuguese": (
        "Encontrar passagens que respondem a uma pergunta", "Encontrar a passagem de um texto curto", "Consulta",
    ),
    "Dutch": ("Vind passages die een vraag beantwoorden", "Vind de passage bij een korte tekst", "Zoekvraag"),
    "Japanese": ("質問に答える文章を探す", "短い文に対応する文章を探す", "クエリ"),
    "Korean": ("질문에 답하는 글을 찾으시오", "짧은 글에 맞는 글을 찾으시오", "질의"),
    "Chinese": ("给定一个问题，检索能回答它的段落", "给定一段短文本，检索与之对应的段落", "查询"),
    "Russian": (
        "Найти отрывки, которые отвечают на вопрос", "Найти отрывок, которому соответствует короткий текст", "Запрос",
    ),
}  # fmt: skip
_SHARE, _LEAD, _SEVERAL = 0.08, 1.5, 3  # of all words; over the next language; different ones
_QUESTION = re.compile(r"[?？؟]\s*$")


def language(texts: Sequence[str]) -> str | None:
    """The language of texts taken together, None where none of the known ones is plain."""
    letters = Counter(
        next((name for name, script in _SCRIPTS.items() if re.match(script, letter)), "Latin")
        for text in texts for letter in text[:2000] if letter.isalpha()
    )  # fmt: skip
    total = letters.total()
    if not total:
        return None
    if letters["Japanese"] > 0.1 * total:  # it writes with Chinese characters too
        return "Japanese"
    name, count = letters.most_common(1)[0]
    if name != "Latin":
        return name if count > 0.5 * total else None
    words = Counter(word for text in texts for word in re.findall(r"\w+", text[:2000].lower()))
    scores = Counter({name: sum(words[word] for word in known.split()) for name, known in _WORDS.items()})
    (best, most), (_, next_most) = scores.most_common(2)
    several = sum(word in words for word in _WORDS[best].split()) >= _SEVERAL  # one may be another's word by chance
    return best if several and most > _SHARE * words.total() and most > _LEAD * next_most else None


def fitting_prompts(queries: Sequence[str], documents: Sequence[str]) -> tuple[dict[str, str], str]:
    """Prompts as `mlpool.load` takes them, {} for none, and the reason in words.

    Args:
        queries, documents: texts of both sides, of which the first belong together.
    """
    asked = sum(bool(_QUESTION.search(text)) for text in queries) / len(queries)
    answered = sum(bool(_QUESTION.search(text)) for text in documents) / len(documents)
    longer = median(map(len, documents)) / max(1, median(map(len, queries)))
    questions = asked >= 0.5
    if answered >= 0.5 or (not questions and longer < 2):
        return {}, "none: both columns hold texts of one kind, which one prompt would not tell apart"
    known = language([*queries, *documents])
    if known is None:
        return {}, "none: the texts are in no single language for which a prompt is known here"
    task = _TASKS[known][0 if questions else 1]
    kind = f"questions ({asked:.0%} end so)" if questions else f"short texts (documents are {longer:.1f} times as long)"
    return {"query": f"Instruct: {task}\n{_TASKS[known][2]}: "}, f"the anchors are {kind}, in {known}"
