"""For tests under Bazel: no editable install of the package, which would find the checkout's."""

import sys

sys.meta_path[:] = [f for f in sys.meta_path if "Redirecting" not in type(f).__name__]
