"""All that an hour on one GPU is to answer, in parts that go on where the last command stopped."""
