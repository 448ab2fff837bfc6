# The interpreter runs this by -c: it takes the runner's sources from the connection to the daemon, whose
# descriptor is the last argument, and becomes the zygote.
import json
import linecache
import os
import struct
import sys
import types


def boot() -> None:
    fd = int(sys.argv[-1])

    def read(count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = os.read(fd, count - len(data))
            if not part:
                os._exit(0)
            data += part
        return data

    start = json.loads(read(struct.unpack("<Q", read(8))[0]))
    sys.argv[:] = start["argv"]
    # what `dask worker` has: the scratch directory and that of its script, not the working directory
    if sys.path[:1] == [""]:
        del sys.path[0]
    sys.path[:0] = [start["local_directory"], *start["path"], os.path.dirname(sys.executable)]
    # users' __main__ is not this
    sys.modules["__main__"] = types.ModuleType("__main__")
    package = types.ModuleType("iqoqo_runner")
    package.__path__ = []
    sys.modules["iqoqo_runner"] = package
    # What is imported here must not start threads, or the zygote could not fork; runners get what the user
    # says, variables and number of threads (zygote.py: restore_threads).
    quiet = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
    given = {name: os.environ.get(name) for name in quiet}
    os.environ.update(quiet)
    for item in start["modules"]:
        name, file, source = "iqoqo_runner." + item["name"], item["file"], item["source"]
        module = types.ModuleType(name)
        module.__file__ = file
        module.__package__ = "iqoqo_runner"
        sys.modules[name] = module
        setattr(package, item["name"], module)
        linecache.cache[file] = (len(source), None, source.splitlines(True), file)
        exec(compile(source, file, "exec"), module.__dict__)
    for name, value in given.items():
        del os.environ[name]
        if value is not None:
            os.environ[name] = value
    sys.modules["iqoqo_runner.zygote"].main(fd)


boot()
