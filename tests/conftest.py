pytest_plugins = ["tests.stack", "tests.fixtures"]
