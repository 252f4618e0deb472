"""The tests. A module's tests have the module's path; `factories` makes what several of them share."""
