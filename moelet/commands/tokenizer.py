"""The command line's verbs of tokenizers. They import what they need when they run, so that --help is quick."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from moelet.storage.disk import check_writable

tokenizer_app = typer.Typer(help="Train a SentencePiece tokenizer, or use one.", no_args_is_help=True)


@tokenizer_app.command("train", epilog="Example: moelet tokenizer train 'texts/*.txt' --vocab-size 8192 --out my.model")
def train_tokenizer(
    files: Annotated[list[str], typer.Argument(metavar="FILES", help="Paths, globs or folders of text.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the model goes.")],
    vocab_size: Annotated[int, typer.Option(min=260)] = 4096,
    algorithm: Annotated[str, typer.Option(help="bpe or unigram.")] = "bpe",
    text_field: Annotated[str, typer.Option(help="The field of rows that holds the text.")] = "text",
) -> None:
    """Train a tokenizer on text files."""
    from moelet.data import START, one_epoch
    from moelet.hparams import make_hparams
    from moelet.tokenizer import Tokenizer

    check_writable(out)
    data = {"source": "files", "files": files, "text_field": text_field}
    settings = make_hparams(
        {"data": data, "tokenizer": {"vocab_size": vocab_size, "algorithm": algorithm}, "train": {"train_steps": 1}}
    )
    windows = one_epoch(settings.data, 0, "all", START)
    texts = (piece.text for pieces, _ in windows for piece in pieces if piece.text is not None)
    tokenizer = Tokenizer.train(texts, vocab_size, settings.tokenizer.algorithm, settings.tokenizer.sample_bytes)
    tokenizer.save(out)
    print(f"{out}: {tokenizer.vocab_size} pieces")


@tokenizer_app.command("encode", epilog='Example: moelet tokenizer encode runs/first/tokenizer.model "some text"')
def encode_text(
    model: Annotated[Path, typer.Argument(metavar="MODEL")],
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="Default: standard input.")] = None,
) -> None:
    """Print the ids of a text."""
    from moelet.tokenizer import Tokenizer

    print(*Tokenizer.load(model).encode(sys.stdin.read() if text is None else text).tolist())


@tokenizer_app.command("decode", epilog="Example: moelet tokenizer decode runs/first/tokenizer.model 17 4 99")
def decode_ids(
    model: Annotated[Path, typer.Argument(metavar="MODEL")],
    ids: Annotated[list[int], typer.Argument(metavar="IDS", min=0, max=2**31 - 1)],
) -> None:
    """Print the text of ids."""
    from moelet.tokenizer import Tokenizer

    print(Tokenizer.load(model).decode(ids))
