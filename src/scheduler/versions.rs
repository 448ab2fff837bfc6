//! The Python a runner will be, and the packages it has: what the scheduler compares with its own.
//!
//! Importing packages to ask their versions takes Python most of a second, so Python only says who it is and where it looks
//! (a bare start, some 10 ms); the metadata that `importlib.metadata` would read is read here, each time afresh, so no cache can be stale.
//!
//! Source: `distributed/versions.py`.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use super::Error;
use crate::proto::Value;

/// `required_packages` and `optional_packages`.
const PACKAGES: [&str; 9] =
    ["dask", "distributed", "msgpack", "cloudpickle", "tornado", "toolz", "numpy", "pandas", "lz4"];

/// How many of [`PACKAGES`] no working installation lacks.
const REQUIRED: usize = 6;

/// A Python that takes longer than this to start is as good as none.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// Marks the answer, behind whatever a `sitecustomize` prints.
const MARK: u8 = 1;

const PROBE: &str = r#"
import os, sys
fields = ["%d.%d.%d.%s.%s" % sys.version_info, sys.prefix, sys.executable or "",
          "64" if sys.maxsize > 2**32 else "32", sys.byteorder, *sys.path]
sys.stdout.flush()
os.write(1, b"\1" + b"\0".join(map(os.fsencode, fields)))
"#;

const ASK: &str = r#"
import os, sys
from importlib.metadata import version
def find(name):
    try:
        return version(name) or ""
    except Exception:
        return ""
sys.stdout.flush()
os.write(1, b"\1" + b"\0".join(os.fsencode(find(name)) for name in sys.argv[1:]))
"#;

/// A Python interpreter as it describes itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Interpreter {
    /// The path it was started by.
    pub python: PathBuf,
    /// `sys.version_info`, dotted: `3.11.7.final.0`.
    pub version: String,
    /// `sys.prefix`: the root of the virtual environment, where there is one.
    pub prefix: PathBuf,
    /// `sys.executable`
    pub executable: PathBuf,
    /// `sys.path`, without the entry for the current directory.
    pub path: Vec<PathBuf>,
    bits: u8,
    byteorder: String,
    processor: String,
}

impl Interpreter {
    /// Starts `python` once, with this process's environment, and asks. Blocks for some 10 ms.
    ///
    /// # Errors
    /// [`Error::Python`] when it cannot be started, fails, or gives no sensible answer.
    pub fn probe(python: &Path) -> Result<Self, Error> {
        let fields = run(python, PROBE, &[])?;
        let answer =
            || Error::Python { python: python.to_owned(), reason: "gave an unexpected answer".into() };
        let [version, prefix, executable, bits, byteorder, path @ ..] = &fields[..] else {
            return Err(answer());
        };
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).map_err(|_| answer());
        let file = |bytes: &Vec<u8>| PathBuf::from(std::ffi::OsString::from_vec(bytes.clone()));
        Ok(Interpreter {
            python: python.to_owned(),
            version: text(version)?,
            prefix: file(prefix),
            executable: file(executable),
            path: path.iter().filter(|entry| !entry.is_empty()).map(file).collect(),
            bits: text(bits)?.parse().map_err(|_| answer())?,
            byteorder: text(byteorder)?,
            processor: processor(),
        })
    }

    /// Major, minor and micro version, as the comm handshake has them.
    pub fn version_triple(&self) -> [u64; 3] {
        let mut numbers = self.version.split('.').map(|n| n.parse().unwrap_or(0));
        std::array::from_fn(|_| numbers.next().unwrap_or(0))
    }

    /// The installed version of one package, by its metadata.
    pub fn package(&self, name: &str) -> Option<String> {
        Installed::scan(&self.path).version(name)
    }

    /// `distributed.versions.get_versions(extra)`.
    pub fn versions(&self, extra: &[String]) -> Value {
        let names: Vec<&str> = PACKAGES.iter().copied().chain(extra.iter().map(String::as_str)).collect();
        let packages = self.packages(&names);
        let python = [("python".into(), self.version.as_str().into())];
        let named = names.iter().zip(packages).map(|(name, version)| (Value::from(*name), version.into()));
        Value::map([
            ("host", self.host()),
            ("packages", Value::Map(python.into_iter().chain(named).collect())),
        ])
    }

    fn packages(&self, names: &[&str]) -> Vec<Option<String>> {
        let installed = Installed::scan(&self.path);
        let versions: Vec<_> = names.iter().map(|name| installed.version(name)).collect();
        if versions.iter().take(REQUIRED).all(Option::is_some) {
            return versions;
        }
        // an importer other than directories (a zip, a finder of some build tool) hides them from us, not from Python
        match run(&self.python, ASK, names) {
            Ok(fields) if fields.len() == names.len() => {
                let text = |bytes: Vec<u8>| String::from_utf8(bytes).ok().filter(|text| !text.is_empty());
                fields.into_iter().map(text).collect()
            }
            _ => versions,
        }
    }

    /// `get_system_info`
    fn host(&self) -> Value {
        let uname = nix::sys::utsname::uname().ok();
        let name = |part: fn(&nix::sys::utsname::UtsName) -> &OsStr| {
            uname.as_ref().map_or_else(String::new, |u| part(u).to_string_lossy().into_owned())
        };
        let env = |name: &str| std::env::var(name).unwrap_or_else(|_| "None".to_owned());
        Value::map([
            ("python", self.version.as_str().into()),
            ("python-bits", i32::from(self.bits).into()),
            ("OS", name(|u| u.sysname()).into()),
            ("OS-release", name(|u| u.release()).into()),
            ("machine", name(|u| u.machine()).into()),
            ("processor", self.processor.as_str().into()),
            ("byteorder", self.byteorder.as_str().into()),
            ("LC_ALL", env("LC_ALL").into()),
            ("LANG", env("LANG").into()),
        ])
    }
}

/// `platform.processor()`, which asks the same program.
fn processor() -> String {
    let output = Command::new("uname").arg("-p").stderr(Stdio::null()).stdin(Stdio::null()).output();
    let text = output.ok().and_then(|o| String::from_utf8(o.stdout).ok()).unwrap_or_default();
    text.trim().to_owned().replace("unknown", "")
}

/// Runs a script and splits what it writes behind the mark.
fn run(python: &Path, script: &str, args: &[&str]) -> Result<Vec<Vec<u8>>, Error> {
    let error = |reason: String| Error::Python { python: python.to_owned(), reason };
    let mut child = Command::new(python)
        .arg("-c")
        .arg(script)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| error(format!("cannot be started: {e}")))?;
    let (send, receive) = mpsc::channel();
    let (mut stdout, mut stderr) = (child.stdout.take(), child.stderr.take());
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let read = stdout.as_mut().map(|pipe| pipe.read_to_end(&mut bytes));
        // the receiver has given up waiting, or takes it
        let _ = send.send(read.transpose().map(|_| bytes));
    });
    let output = receive.recv_timeout(START_TIMEOUT);
    if output.is_err() {
        let _ = child.kill();
    }
    let status = child.wait().map_err(|e| error(format!("cannot be waited for: {e}")))?;
    if output.is_ok() {
        let _ = reader.join();
    }
    let output = output.map_err(|_| error(format!("did not answer within {START_TIMEOUT:?}")))?;
    let output = output.map_err(|e| error(format!("cannot be read from: {e}")))?;
    let Some(at) = output.iter().rposition(|byte| *byte == MARK).filter(|_| status.success()) else {
        let mut text = String::new();
        let _ = stderr.as_mut().map(|pipe| pipe.read_to_string(&mut text));
        let last = text.trim().lines().last().unwrap_or("no message").to_owned();
        return Err(error(format!("failed with {status}: {last}")));
    };
    Ok(output[at + 1..].split(|byte| *byte == 0).map(<[u8]>::to_vec).collect())
}

/// Metadata directories by normalised package name; the first on the path wins, as in `importlib.metadata`.
struct Installed(HashMap<String, PathBuf>);

impl Installed {
    fn scan(path: &[PathBuf]) -> Self {
        let mut found = HashMap::new();
        for directory in path {
            // an entry that is not there, or no directory, holds nothing
            let Ok(entries) = std::fs::read_dir(directory) else { continue };
            for entry in entries.flatten() {
                if let Some(name) = package_name(entry.file_name().as_bytes()) {
                    found.entry(name).or_insert_with(|| entry.path());
                }
            }
        }
        Installed(found)
    }

    fn version(&self, name: &str) -> Option<String> {
        let path = self.0.get(&normalise(name))?;
        // an old .egg-info may be the metadata file itself
        let candidates = [path.join("METADATA"), path.join("PKG-INFO"), path.clone()];
        let text = candidates.iter().find_map(|file| std::fs::read(file).ok())?;
        let text = String::from_utf8_lossy(&text);
        let mut headers = text.lines().take_while(|line| !line.is_empty());
        let value = headers.find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("version").then(|| value.trim().to_owned())
        });
        value.filter(|version| !version.is_empty())
    }
}

/// The package that a metadata directory of this name describes.
fn package_name(file: &[u8]) -> Option<String> {
    let file = std::str::from_utf8(file).ok()?;
    let lower = file.to_ascii_lowercase();
    let stem = lower.strip_suffix(".dist-info").or_else(|| lower.strip_suffix(".egg-info"))?;
    let name = stem.split('-').next()?;
    (!name.is_empty()).then(|| normalise(name))
}

/// PEP 503, with `_` as `importlib.metadata` has it: runs of `-`, `_` and `.` are one `_`.
fn normalise(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    for c in name.chars() {
        match c {
            '-' | '_' | '.' if out.ends_with('_') => {}
            '-' | '_' | '.' => out.push('_'),
            c => out.extend(c.to_lowercase()),
        }
    }
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn venv() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin/python")
    }

    #[test]
    fn agrees_with_dask() {
        let script = "import json, distributed.versions as v; print(json.dumps(v.get_versions(['Click', 'nothing-of-this-name'])))";
        let output = Command::new(venv()).args(["-c", script]).output().unwrap();
        let theirs: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let extra = ["Click".to_owned(), "nothing-of-this-name".to_owned()];
        let python = Interpreter::probe(&venv()).unwrap();
        assert_eq!(as_json(&python.versions(&extra)), theirs);
        let triple = python.version_triple().map(|n| n.to_string()).join(".");
        assert!(python.version.starts_with(&triple), "{triple}");
        assert!(python.prefix.join("pyvenv.cfg").exists());
    }

    #[test]
    fn asks_python_for_what_is_hidden_from_us() {
        let python = Interpreter::probe(&venv()).unwrap();
        let blind = Interpreter { path: Vec::new(), ..python.clone() };
        assert_eq!(blind.package("dask"), None);
        assert_eq!(blind.versions(&[]), python.versions(&[]));
    }

    #[test]
    fn metadata_of_every_kind() {
        let root = tempfile::tempdir().unwrap();
        let (first, second) = (root.path().join("a"), root.path().join("b"));
        let write = |dir: &Path, file: &str, text: &str| {
            let path = dir.join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write(
            &first,
            "My.Package-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: x\nversion: 1.0\n\nVersion: 9\n",
        );
        write(&second, "my_package-2.0.dist-info/METADATA", "Version: 2.0\n");
        write(&second, "old.egg-info/PKG-INFO", "Version: 3\n");
        write(&second, "older-4.egg-info", "Version: 4\n");
        write(&second, "broken-5.dist-info/METADATA", "Name: broken\n");
        let installed = Installed::scan(&[root.path().join("none"), first, second]);
        let version = |name: &str| installed.version(name);
        assert_eq!(version("my-package").as_deref(), Some("1.0"));
        assert_eq!((version("old").as_deref(), version("OLDER").as_deref()), (Some("3"), Some("4")));
        assert_eq!((version("broken"), version("absent")), (None, None));
    }

    #[test]
    fn a_python_that_is_none() {
        let text = |path: &str| Interpreter::probe(Path::new(path)).unwrap_err().to_string();
        assert!(text("/nonexistent/python").contains("cannot be started"));
        assert!(text("/bin/false").contains("failed with exit status: 1"));
        assert!(text("/bin/true").contains("failed with exit status: 0"));
    }

    fn as_json(value: &Value) -> serde_json::Value {
        match value {
            Value::Map(items) => {
                items.iter().map(|(k, v)| (k.as_str().unwrap().to_owned(), as_json(v))).collect()
            }
            Value::Str(s) => (**s).into(),
            Value::Int(i) => (i.get() as i64).into(),
            Value::Nil => serde_json::Value::Null,
            other => unreachable!("{other:?}"),
        }
    }
}
