//! Holds the code to the table of rooms in `src/lib.rs`, and files to the house rules a compiler does not know.
//!
//! Reads sources as text: good enough to find a `crate::room` that should not be there, and nothing to fool itself with.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Lines of code a file may have, without tests, comments and blank lines.
const FILE_LINES: usize = 500;

/// A row of the table.
#[derive(Debug)]
struct Room {
    level: u32,
    may_use: BTreeSet<String>,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The rows of the table in `src/lib.rs`; "everything above" stands for all rooms of lower levels.
fn rooms() -> BTreeMap<String, Room> {
    let text = std::fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let mut rooms: BTreeMap<String, Room> = BTreeMap::new();
    for line in text.lines().filter_map(|line| line.strip_prefix("//! |")) {
        let cells: Vec<&str> = line.trim_end_matches('|').split('|').map(str::trim).collect();
        let [level, names, _, may_use] = cells[..] else { continue };
        let Ok(level) = level.parse() else { continue };
        let lower = || rooms.iter().filter(|(_, room)| room.level < level).map(|(name, _)| name.clone());
        let may_use: BTreeSet<String> = match may_use {
            "-" => BTreeSet::new(),
            "everything above" => lower().collect(),
            list => list.split(',').map(|name| name.trim().to_owned()).collect(),
        };
        for name in names.split(',').map(|name| name.trim().trim_matches('`').to_owned()) {
            rooms.insert(name, Room { level, may_use: may_use.clone() });
        }
    }
    rooms
}

/// Every Rust file below `folder`.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// A file of `src/`, its tests and comments taken out.
struct Source {
    path: PathBuf,
    room: String,
    text: String,
    code: String,
}

/// The files of the crate without those that are tests altogether.
fn crate_files() -> Vec<Source> {
    let src = root().join("src");
    let paths = sources(&src);
    let read = |path: &PathBuf| std::fs::read_to_string(path).unwrap();
    let tests: BTreeSet<PathBuf> = paths.iter().flat_map(|path| test_files(path, &read(path))).collect();
    let of_crate = paths.iter().filter(|path| !tests.contains(*path));
    of_crate
        .map(|path| {
            let first = path.strip_prefix(&src).unwrap().components().next().unwrap();
            let room = first.as_os_str().to_str().unwrap().trim_end_matches(".rs").to_owned();
            let text = read(path);
            let code = code(&text);
            Source { path: path.clone(), room, text, code }
        })
        .collect()
}

/// The files that a file declares as modules for tests only.
fn test_files(path: &Path, text: &str) -> Vec<PathBuf> {
    let folder = match path.file_stem().unwrap().to_str().unwrap() {
        "mod" | "lib" | "main" => path.parent().unwrap().to_owned(),
        _ => path.with_extension(""),
    };
    let mut found = Vec::new();
    let mut in_test = false;
    for line in text.lines().map(str::trim) {
        let module =
            line.trim_start_matches("pub ").strip_prefix("mod ").and_then(|rest| rest.strip_suffix(';'));
        if let Some(module) = module.filter(|_| in_test) {
            found.extend([folder.join(format!("{module}.rs")), folder.join(module).join("mod.rs")]);
        }
        in_test = line == "#[cfg(test)]" || (in_test && line.starts_with("#["));
    }
    found
}

/// What comes before the test module, without comments.
fn code(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let is_tests = |i: usize| {
        let declared = lines[i + 1..].iter().find(|line| !line.starts_with("#["));
        lines[i] == "#[cfg(test)]"
            && declared.is_some_and(|line| line.starts_with("mod ") && line.ends_with('{'))
    };
    let end = (0..lines.len()).find(|i| is_tests(*i)).unwrap_or(lines.len());
    let without = lines[..end].iter().map(|line| line.split("//").next().unwrap_or_default());
    without.collect::<Vec<_>>().join("\n")
}

/// The names after each `crate::`, those of a group included.
fn uses(code: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    for (at, path) in code.match_indices("crate::") {
        if code[..at].ends_with(|c| is_name(c) || c == '$') {
            continue;
        }
        let rest = &code[at + path.len()..];
        let Some(group) = rest.strip_prefix('{') else {
            names.insert(rest.chars().take_while(|c| is_name(*c)).collect());
            continue;
        };
        let (mut depth, mut item) = (0, String::new());
        for c in group.chars() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    names.insert(std::mem::take(&mut item));
                }
                c if depth == 0 => item.push(c),
                _ => {}
            }
        }
        names.insert(item);
    }
    let first = |name: String| name.trim().split(|c| !is_name(c)).next().unwrap_or_default().to_owned();
    names.into_iter().map(first).filter(|name| !name.is_empty() && name != "self").collect()
}

fn assert_none(wrong: &[String]) {
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn rooms_use_only_what_the_table_says() {
    let rooms = rooms();
    let mut wrong = Vec::new();
    for file in crate_files().iter().filter(|file| !matches!(file.room.as_str(), "lib" | "main")) {
        let Some(room) = rooms.get(&file.room) else {
            wrong.push(format!("{}: room {} is not in the table", file.path.display(), file.room));
            continue;
        };
        for used in uses(&file.code).iter().filter(|used| **used != file.room && rooms.contains_key(*used)) {
            if !room.may_use.contains(used) {
                wrong.push(format!("{}: {} may not use {used}", file.path.display(), file.room));
            }
        }
    }
    assert_none(&wrong);
}

#[test]
fn the_table_only_points_down() {
    let rooms = rooms();
    assert!(rooms.len() > 8, "the table was not understood: {rooms:?}");
    for (name, room) in &rooms {
        for used in &room.may_use {
            let below = rooms.get(used).unwrap_or_else(|| panic!("{name} uses {used}, which is no room"));
            assert!(below.level < room.level, "{name} and {used}");
        }
    }
}

#[test]
fn every_module_is_in_the_table_and_the_architecture() {
    let rooms = rooms();
    let lib = std::fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let modules = lib.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'));
    let architecture = std::fs::read_to_string(root().join("docs/architecture.md")).unwrap();
    for module in modules {
        let room = rooms.get(module).unwrap_or_else(|| panic!("{module} is not in the table of src/lib.rs"));
        let level = format!("| {} | ", room.level);
        let mut rows = architecture.lines().filter(|line| line.starts_with(&level));
        assert!(
            rows.any(|row| row.split('|').nth(2).is_some_and(|names| names.contains(&format!("`{module}`")))),
            "docs/architecture.md has no {module} at level {}",
            room.level
        );
    }
}

#[test]
fn files_say_what_lives_there_and_stay_small() {
    let mut wrong = Vec::new();
    for file in crate_files() {
        let path = file.path.display();
        if !file.text.starts_with("//!") {
            wrong.push(format!("{path}: does not begin with //!"));
        }
        let lines = file.code.lines().filter(|line| !line.trim().is_empty()).count();
        if lines > FILE_LINES {
            wrong.push(format!("{path}: {lines} lines of code"));
        }
    }
    let tests = sources(&root().join("tests"));
    let read = |path: &PathBuf| std::fs::read_to_string(path).unwrap();
    let bare = tests.iter().filter(|path| !read(path).starts_with("//!"));
    wrong.extend(bare.map(|path| format!("{}: does not begin with //!", path.display())));
    assert_none(&wrong);
}

#[test]
fn only_sys_may_be_unsafe() {
    let mut wrong = Vec::new();
    for file in crate_files().iter().filter(|file| file.room != "sys") {
        if file.text.contains("allow(unsafe_code)") || file.text.contains("expect(unsafe_code)") {
            wrong.push(format!("{}: allows unsafe code", file.path.display()));
        }
    }
    assert_none(&wrong);
}

#[test]
fn the_checks_themselves_see() {
    assert_eq!(
        uses("use crate::{a, b::{c, d}, self};\nlet x = crate::e::f();\nuse $crate::g;\nmycrate::h"),
        ["a", "b", "e"].map(str::to_owned).into()
    );
    let text = "use crate::a; // crate::b\n#[cfg(test)]\nfn helper() {}\n#[cfg(test)]\n#[allow(x)]\nmod tests {\ncrate::c\n}\n";
    assert_eq!(uses(&code(text)), ["a".to_owned()].into());
    let files = test_files(Path::new("src/x/mod.rs"), "#[cfg(test)]\nmod tests;\nmod real;\n");
    assert_eq!(files[0], Path::new("src/x/tests.rs"));
    assert_eq!(files.len(), 2);
}
