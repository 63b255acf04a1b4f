"""What would break check 32, put into a copy: `python -m tests.mutants faults` shows that a test fails."""

from tests.mutants import Mutant

MUTANTS = [
    Mutant(
        "a server that answers to any name",
        "moelet/serve/guard.py",
        "if not (name in rules.hosts or (rules.addresses and is_address(name))):",
        "if False:",
        "tests/test_serve.py::test_other_names_and_pages_are_kept_out",
    ),
    Mutant(
        "a server that answers other pages",
        "moelet/serve/guard.py",
        'if origin.partition("://")[2].lower() != hosts[0].lower():',
        "if False:",
        "tests/test_serve.py::test_other_names_and_pages_are_kept_out",
    ),
    Mutant(
        "writing on for who has gone",
        "moelet/serve/app.py",
        "            self._engine.cancel(self._order)\n            work.cancel()",
        "            work.cancel()",
        "tests/test_serve.py::test_who_goes_away_frees_the_place_within_a_second",
    ),
    Mutant(
        "a line without an end",
        "moelet/serve/engine.py",
        "if len(order.writings) > room:",
        "if False:",
        "tests/test_serve.py::test_the_line_is_bounded_and_moves_up",
    ),
    Mutant(
        "bodies of any size",
        "moelet/serve/app.py",
        "    if size > BODY:",
        "    if False:",
        "tests/test_serve.py::test_a_slow_or_large_body",
    ),
    Mutant(
        "patience without an end",
        "moelet/serve/server.py",
        "            self._stall.set(STALL_SECONDS)",
        "            pass",
        "tests/test_serve.py::test_patience_ends",
    ),
    Mutant(
        "stop texts looked for in single tokens",
        "moelet/serve/writing.py",
        "waiting = 0 if final else max(",
        "waiting = 0 if final or True else max(",
        "tests/test_serve.py::test_stops_across_tokens",
    ),
    Mutant(
        "every layer's experts in the place of the first's",
        "moelet/kernels/decode.c",
        "feed_forward(p, l, normed, chosen + route, weights + route, hidden, out, y);",
        "feed_forward(p, l, normed, chosen, weights, hidden, out, y);",
        "tests/test_decoding.py::test_the_experts_are_the_routers",
    ),
]
