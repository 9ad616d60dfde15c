"""Reports: `visrl.report(…)` is `visrl.report.page.report`.

run             what lies in a run folder; loop and evaluations read its parts, shapes says what they must hold
rules           which critic and rule made the pairs of an iteration
measures        scores with intervals and their titles
online          an online training; online_rules tells known failures from its curves
several_looks   what a run learned of several looks, kind by kind; looks counts those of every evaluation
page            the page; figures draws, gallery picks questions to look at, story puts it into words
"""

from visrl.callable_package import make_callable

make_callable(__name__, "page", "report")
