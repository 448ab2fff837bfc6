//! Tasks of every form, and what they see.

use super::fixture::*;
use super::forge;

#[tokio::test]
async fn a_task_runs() {
    let mut fixture = Fixture::new(1);
    let done = fixture.run("def f(a, b=1): return a + b\nargs = (2,)").await;
    assert_eq!((done.key, done.run_id), ("x".into(), RunId(7)));
    assert_eq!(forge::result(&done.object.to_payload(), "x"), "3");
    assert_eq!((&*done.typename, done.object.nbytes()), ("int", 28));
    assert!(done.start <= done.stop && done.stop - done.start < 1.0);
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn an_exception_arrives_as_from_dasks_worker() {
    let mut fixture = Fixture::new(1);
    fixture.pool.submit(job("x", "def f(a):\n  def g(): raise KeyError(a)\n  g()\nargs = ('why',)"));
    let failed = fixture.failed().await;
    assert_eq!(&*failed.exception_text, "KeyError('why')");
    assert_eq!(forge::raised(&failed.exception, "(type(x), x.args)"), "(<class 'KeyError'>, ('why',))");
    // the frames of Dask and ours are cut off, the user's are there
    let lines: Vec<&str> = failed.traceback_text.lines().filter(|line| line.contains("File")).collect();
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(lines[0].ends_with("in f") && lines[1].ends_with("in g"), "{lines:?}");
    let traceback = failed.traceback.unwrap();
    assert_eq!(forge::raised(&traceback, "x.tb_frame.f_code.co_name"), "'f'");
    assert!(failed.start.unwrap() <= failed.stop.unwrap());
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn large_objects_pass_through_shared_memory() {
    let mut fixture = Fixture::new(2);
    let made = fixture.run("def f():\n  import numpy\n  return numpy.arange(1_000_000)").await;
    assert_eq!(made.object.shared_bytes(), 8_000_000);
    assert_eq!(&*made.typename, "numpy.ndarray");
    let code = "def f(a):\n  a[0] = 5\n  return int(a.sum()), a.flags.writeable\nargs = (TaskRef('in'),)";
    for _ in 0..2 {
        // written to by the task, yet the same for the next
        fixture.pool.submit(job_with("y", code, vec![("in".into(), made.object.clone())]));
        let done = fixture.finished().await;
        assert_eq!(forge::result(&done.object.to_payload(), "x"), "(499999500005, True)");
    }
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn results_of_middling_size_take_no_descriptors() {
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let mut fixture = Fixture::new(1);
    fixture.run("def f(): return 1").await;
    let (mut held, before) = (Vec::new(), descriptors());
    for sizes in ["(70_000,)", "(66_000,) * 3"] {
        let code = format!("def f():\n  import numpy\n  return [numpy.ones(n, 'u1') for n in {sizes}]");
        let template = job("x", &code);
        for _ in 0..250 {
            fixture.pool.submit(template.clone());
            held.push(fixture.finished().await.object);
        }
    }
    // other tests run beside this one
    assert!(descriptors() < before + 250, "{} descriptors", descriptors() - before);
    let shared: u64 = held.iter().map(Object::shared_bytes).sum();
    assert_eq!(shared, 250 * (70_000 + 3 * 66_000));
    let code = "def f(a):\n  a[0] += 1\n  return sum(int(x.sum()) for x in a)\nargs = (TaskRef('in'),)";
    for (object, sum) in [(&held[5], "140000"), (&held[5], "140000"), (&held[400], "264000")] {
        // written to by the task, yet the same for the next
        fixture.pool.submit(job_with("y", code, vec![("in".into(), object.clone())]));
        let read = fixture.finished().await.object.to_payload();
        assert_eq!(forge::result(&read, "x"), sum);
    }
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn coroutines_reschedules_annotations_and_unpicklable_results_are_as_in_dasks_worker() {
    let mut fixture = Fixture::new(1);
    let done = fixture.run("import asyncio\nasync def f():\n  await asyncio.sleep(0.01)\n  return 4").await;
    assert_eq!(forge::result(&done.object.to_payload(), "x"), "4");

    fixture.pool.submit(job("x", "from distributed import Reschedule\ndef f(): raise Reschedule"));
    assert!(matches!(fixture.next().await, Event::Reschedule { key, .. } if key == "x".into()));

    let mut odd = job("x", "def f(): return 1");
    odd.annotations = Arc::new(Value::map([("executor", "gpu".into())]));
    fixture.pool.submit(odd);
    let failed = fixture.failed().await;
    assert!(failed.exception_text.contains("Invalid executor 'gpu'"), "{}", failed.exception_text);
    assert_eq!(failed.start, None);

    // the result is kept, and opening it raises, as with Dask
    let done = fixture.run("def f():\n  import threading\n  return threading.Lock()").await;
    assert_eq!(&*done.typename, "_thread.lock");
    let code = "def f(a): pass\nargs = (TaskRef('in'),)";
    fixture.pool.submit(job_with("y", code, vec![("in".into(), done.object)]));
    let failed = fixture.failed().await;
    assert!(failed.exception_text.contains("Could not serialize object of type lock"), "{failed:?}");

    let code = "class E(Exception):\n  def __reduce__(self): raise RuntimeError\ndef f(): raise E('text')";
    fixture.pool.submit(job("x", code));
    let failed = fixture.failed().await;
    assert_eq!(
        forge::raised(&failed.exception, "(type(x).__name__, x.args)"),
        "('Exception', (\"E('text')\",))"
    );
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn a_task_that_cannot_be_opened_fails_with_the_reason() {
    let mut fixture = Fixture::new(1);
    let code = "class C:\n  def __reduce__(self): return (int, ('seven',))\ndef f(a): pass\nargs = (C(),)";
    fixture.pool.submit(job("x", code));
    let failed = fixture.failed().await;
    assert!(failed.exception_text.starts_with("ValueError("), "{}", failed.exception_text);
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn output_is_logged_with_its_task() {
    let mut fixture = Fixture::new(1);
    fixture.run("import os\ndef f():\n  print('one')\n  os.write(2, b'two\\nthree')").await;
    let lines: Vec<&str> = fixture.output.iter().map(|(_, line)| line.as_str()).collect();
    assert_eq!(lines, ["one", "two"]);
    assert!(fixture.output.iter().all(|(key, _)| *key == Some("x".into())));
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn tasks_see_what_dasks_worker_shows_them() {
    let mut fixture = Fixture::new(1);
    fixture.pool.set_worker_info(WorkerInfo {
        address: "tcp://1.2.3.4:5".into(),
        name: "w".into(),
        scheduler_address: "tcp://1.2.3.4:6".into(),
        ..WorkerInfo::default()
    });
    let code = "def f():\n  import os, sys, distributed\n  w = distributed.get_worker()\n  \
        w.log_event('topic', {'a': 1})\n  return {'worker': (w.address, w.name, w.scheduler.address, \
        w.get_current_task()), 'seed': os.environ['PYTHONHASHSEED'], 'path': '' in sys.path or os.getcwd() in \
        sys.path, 'argv': sys.argv, 'main': sorted(vars(sys.modules['__main__']))[0][:2], 'stdin': \
        os.readlink('/proc/self/fd/0'), 'session': os.getsid(0) == os.getpid()}";
    fixture.pool.submit(job("x", code));
    let Event::ToScheduler(message) = fixture.next().await else { panic!("a message") };
    assert_eq!(message.field("op"), Some(&"log-event".into()));
    let done = fixture.finished().await.object.to_payload();
    let worker = forge::result(&done, "x['worker']");
    assert_eq!(worker, "('tcp://1.2.3.4:5', 'w', 'tcp://1.2.3.4:6', 'x')");
    let rest = forge::result(&done, "[x[k] for k in ('seed', 'path', 'argv', 'main', 'stdin', 'session')]");
    assert_eq!(rest, "['6640', False, ['iqoqo-dask-worker'], '__', '/dev/null', True]");
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn call_stacks_show_what_runs() {
    let mut fixture = Fixture::new(2);
    let gate = Gate::new();
    fixture.pool.submit(job("x", &gate.code("return 0")));
    gate.entered().await;
    for keys in [None, Some(&["x".into()][..])] {
        let stacks = fixture.pool.call_stacks(keys).await;
        assert_eq!(stacks.len(), 1);
        assert_eq!(stacks[0].0, "x".into());
        assert!(stacks[0].1.iter().any(|line| line.contains(", in f\n\t")), "{stacks:?}");
    }
    assert!(fixture.pool.call_stacks(Some(&["y".into()])).await.is_empty());
    gate.open();
    fixture.finished().await;
    assert!(fixture.pool.call_stacks(None).await.is_empty());
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn more_inputs_than_descriptors_in_a_message_arrive() {
    let mut fixture = Fixture::new(1);
    let made = fixture.run("def f(): return b'x' * 300_000").await.object;
    let again = fixture.run("def f(): return b'y' * 300_000").await.object;
    // alternate, and each with a memfd of its own
    let arena = Arena::new();
    let objects: Vec<(Key, Object)> = (0..300)
        .map(|i| {
            let object = if i % 2 == 0 { &made } else { &again };
            let copy = Object::from_payload(object.to_payload(), 1, &arena).unwrap();
            (Key::from(format!("in{i}")), copy)
        })
        .collect();
    let code = "def f(*a): return len(a), b''.join(x[:1] for x in a)\n\
        args = tuple(TaskRef(f'in{i}') for i in range(300))";
    fixture.pool.submit(job_with("y", code, objects));
    let done = fixture.finished().await;
    let expected = format!("(300, b'{}')", "xy".repeat(150));
    assert_eq!(forge::result(&done.object.to_payload(), "x"), expected);
    fixture.pool.shutdown().await;
}

#[tokio::test]
async fn numeric_libraries_use_the_threads_the_environment_says() {
    for (threads, arrow) in [("1", None), ("3", Some("x:y"))] {
        let mut config = config(1);
        let set = |(name, value): (&str, &str)| (name.into(), value.into());
        config.environment = vec![set(("OPENBLAS_NUM_THREADS", threads))];
        config.environment.extend(arrow.map(|value| set(("JE_ARROW_MALLOC_CONF", value))));
        let mut fixture = Fixture::with(config);
        let code = "def f():\n  import ctypes, os, numpy\n  numpy.ones(1)\n  \
            path = next(l.split()[-1] for l in open('/proc/self/maps') if 'openblas' in l)\n  \
            return ctypes.CDLL(path).scipy_openblas_get_num_threads64_(), \
            os.environ['OPENBLAS_NUM_THREADS'], os.environ.get('JE_ARROW_MALLOC_CONF')";
        let done = fixture.run(code).await.object.to_payload();
        let arrow = arrow.map_or("None".to_owned(), |value| format!("'{value}'"));
        assert_eq!(forge::result(&done, "x"), format!("({threads}, '{threads}', {arrow})"));
        fixture.pool.shutdown().await;
    }
}
