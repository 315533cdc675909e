"""Properties that hold for all inputs: `hypothesis` with the same examples in every run."""

from hypothesis import HealthCheck, given, settings

#: How many times the examples of the quick run the slow one takes.
DEEPER = 20
_DEEP = {}


def holds(examples, **strategies):
    """Makes a test of a property: ``examples`` examples of its arguments, drawn alike each time."""

    def wrap(check):
        def of(number):
            return settings(
                max_examples=number,
                derandomize=True,
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            )(given(**strategies)(check))

        _DEEP.setdefault(check.__module__, []).append(of(DEEPER * examples))
        return of(examples)

    return wrap


def deeper(module):
    """The properties of a test module with more examples, for a slow test."""
    return _DEEP[module]
