"""What kind of text each token is: a newline, a digit, the beginning of a name, the rest of a word.

A class is that of a piece and, for letters, of the piece before it: what a router could know at that place. The words
of FUNCTION_WORDS are English; other languages' count as words.
"""

import unicodedata

import numpy as np

from moelet.tokenizer import Tokenizer

CLASSES = (
    "start or end",  # BOS, EOS
    "newline",  # and a piece that ends a line, such as ":\n"
    "space",  # spaces and tabs alone: indentation
    "digit",
    "punctuation",
    "symbol",  # brackets, operators and the like
    "function word",  # a whole piece of FUNCTION_WORDS at a word's beginning
    "capitalised",  # another beginning with a capital: names, sentences, classes of code
    "word",  # every other beginning
    "word part",  # letters that go on with a word
    "other",  # bytes of other characters, mixtures
)
SYMBOLS = frozenset("()[]{}<>=+*/\\%&|^~@#$_`")  # of code, whatever Unicode calls them
FUNCTION_WORDS = frozenset(
    """a about after all also an and any are as at be been before but by can could did do does for from had has have he
    her here him his how i if in into is it its just like may me more must my no not now of on one only or other our out
    over she should so some than that the their them then there these they this those to too under up upon us very was
    we were what when where which while who whom whose why will with would you your""".split()
)
_LETTERS = -1  # of a piece whose class depends on the one before it


def _kind(piece: str) -> int:
    """Return the place in CLASSES of a piece that is the same everywhere, else _LETTERS."""
    if "\n" in piece or "\r" in piece:
        return CLASSES.index("newline")
    body = piece.strip()
    if not body:
        return CLASSES.index("space")
    if body.isnumeric():
        return CLASSES.index("digit")
    if body.isalpha():
        return _LETTERS
    general = {unicodedata.category(character)[0] for character in body}
    if general <= {"P", "S"}:
        return CLASSES.index("symbol" if "S" in general or SYMBOLS & set(body) else "punctuation")
    return CLASSES.index("other")


def classes_of(tokenizer: Tokenizer, ids_T: np.ndarray) -> np.ndarray:
    """Return the place in CLASSES of each token of a text, (T,); a first one counts as a beginning."""
    pieces = tokenizer.pieces
    kinds_V = np.array([_kind(piece) for piece in pieces])
    kinds_V[: tokenizer.pad_id + 1] = CLASSES.index("start or end")
    goes_on_V = np.array([piece[-1:].isalnum() or piece[-1:] in ("_", "'", "’") for piece in pieces])
    goes_on_V[: tokenizer.pad_id + 1] = False
    words = [piece.strip() for piece in pieces]
    begins_V = np.full(len(pieces), CLASSES.index("word"))
    begins_V[[word[:1].isupper() for word in words]] = CLASSES.index("capitalised")
    begins_V[[word.casefold() in FUNCTION_WORDS for word in words]] = CLASSES.index("function word")
    spaced_V = np.array([piece[:1].isspace() for piece in pieces])
    before_T = np.concatenate([[False], goes_on_V[ids_T[:-1]]])
    letters_T = np.where(before_T & ~spaced_V[ids_T], CLASSES.index("word part"), begins_V[ids_T])
    return np.where(kinds_V[ids_T] == _LETTERS, letters_T, kinds_V[ids_T])
