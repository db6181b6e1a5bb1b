__version__ = "0.1.0"


def __getattr__(name: str):
    "Load the public classes when they are first used, so that `import ardm_course` stays light."
    if name in ("TTS", "Speech"):
        from . import tts
        return getattr(tts, name)
    raise AttributeError(f"module 'ardm_course' has no attribute {name!r}")
