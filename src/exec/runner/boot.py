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
    sys.path[:0] = [start["local_directory"], os.path.dirname(sys.executable)]
    # users' __main__ is not this
    sys.modules["__main__"] = types.ModuleType("__main__")
    package = types.ModuleType("iqoqo_runner")
    package.__path__ = []
    sys.modules["iqoqo_runner"] = package
    for item in start["modules"]:
        name, file, source = "iqoqo_runner." + item["name"], item["file"], item["source"]
        module = types.ModuleType(name)
        module.__file__ = file
        module.__package__ = "iqoqo_runner"
        sys.modules[name] = module
        setattr(package, item["name"], module)
        linecache.cache[file] = (len(source), None, source.splitlines(True), file)
        exec(compile(source, file, "exec"), module.__dict__)
    sys.modules["iqoqo_runner.zygote"].main(fd)


boot()
