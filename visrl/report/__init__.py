"""Reports: `visrl.report(…)` is `visrl.report.page.report`."""

from visrl.callable_package import make_callable

make_callable(__name__, "page", "report")
