"""Search strategies: choice of the next plans to try, given the trials so far."""
