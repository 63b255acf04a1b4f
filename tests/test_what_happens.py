"""docs/what-happens-when.md says what the tests in tests/faults try, and each of these says what happens then."""

from faults.page import PAGE, areas, events, page


def test_the_page_is_what_the_tests_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.faults.page, and commit the page"


def test_every_event_says_what_happens_then() -> None:
    for event in events():
        assert event.check in areas() and event.then.endswith((".", "!")), f"{event.file}: {event.name} has no sentence"
