"""`python -m flashmoe_jax doctor`."""

import sys

from flashmoe_jax import doctor

if sys.argv[1:2] == ["doctor"]:
    sys.exit(doctor.main(sys.argv[2:]))
sys.exit("usage: python -m flashmoe_jax doctor [--json]")
