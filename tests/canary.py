"""What every token of the suite's servers begins with: watched for in what tests print, log and leave in files."""

CANARY = "c4n4ry-of-the-suite"
