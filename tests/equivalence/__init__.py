"""One suite of cases for every implementation of the operator, against the float64 oracle."""
