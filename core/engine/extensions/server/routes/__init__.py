"""The routes, a module each group. A module has a ``router``; `engine.extensions.server.app` lists them all."""
