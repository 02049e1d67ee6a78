//! Other users on the unix socket, paths that are not allowed, and callers who run wild.

use crate::bench::{Bench, refused, wait_for, wait_state};
use crate::fake::Script;
use crate::trial;
use libtest_mimic::Trial;
use ramtorch_client::v1::{self, JobState, model_source::Source};
use ramtorch_client::{Client, ClientError, Endpoint, exit};
use ramtorchd::access::config::{LimitsConfig, UserRef};
use serde_json::{Value, json};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use tokio::io::AsyncBufReadExt;

/// `nobody` and `daemon`, users of every system; and their groups here.
const NOBODY: u32 = 65_534;
const DAEMON: u32 = 1;

/// `caller SOCKET JOB TOML BASE`: everything that one user can try on another's job, and on a job of one's own; JSON of what came of it.
pub fn caller_main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    println!("{}", runtime.block_on(call(&arguments[2], &arguments[3], &arguments[4], &arguments[5])));
    ExitCode::SUCCESS
}

fn outcome<T>(result: Result<T, ClientError>) -> Value {
    match result {
        Ok(_) => json!("ok"),
        Err(e) => json!(e.to_string()),
    }
}

async fn call(socket: &str, theirs: &str, job_toml: &str, base_dir: &str) -> Value {
    let mut c = match Client::connect(Endpoint::unix(socket)).await {
        Ok(c) => c,
        Err(e) => return json!({ "connect": e.to_string() }),
    };
    let model = || Some(v1::ModelSource { source: Some(Source::Job(theirs.into())) });
    let logs = v1::LogsRequest { id: theirs.into(), ..Default::default() };
    let mut all = json!({
        "get": outcome(c.get(theirs).await),
        "watch": outcome(c.watch(theirs, 0).await),
        "cancel": outcome(c.cancel(theirs).await),
        "checkpoint": outcome(c.checkpoint(theirs).await),
        "logs": outcome(c.logs(logs).await),
        "trace": outcome(c.trace(v1::TraceRequest { id: theirs.into(), steps: 1, first_step: 1 }).await),
        "inspect": outcome(c.inspect(v1::InspectRequest { model: model(), ..Default::default() }).await),
        "export": outcome(c.export(v1::ExportRequest { model: model(), path: "/tmp/x".into(), ..Default::default() }).await),
        "shutdown": outcome(c.shutdown().await),
        "info": outcome(c.info().await),
    });
    all["listed"] = match c.list(true).await {
        Ok(jobs) => jobs.iter().map(|j| json!([j.id, j.name, j.spec_toml, j.uid])).collect(),
        Err(e) => json!(e.to_string()),
    };
    let request = v1::SubmitRequest { job_toml: job_toml.into(), base_dir: base_dir.into(), ..Default::default() };
    all["own"] = match c.submit(request).await {
        // The newest job of this name is another user's: a name means one's own job first.
        Ok(job) => json!([outcome(c.get("same").await), outcome(c.get(&job.id[..6]).await), outcome(c.cancel("same").await), job.uid]),
        Err(e) => json!(e.to_string()),
    };
    all
}

/// `submitter SOCKET TOML BASE WHAT`: submits, plans (`plan`), exports to the path TOML (`export`) or generates (`generate`: told when text
/// comes, and gone on with); JSON of the job's id or of the refusal.
pub fn submitter_main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut text = None;
    let said = runtime.block_on(async {
        let mut c = Client::connect(Endpoint::unix(&arguments[2])).await.map_err(|e| e.to_string())?;
        let (toml, base_dir) = (arguments[3].clone(), arguments[4].clone());
        let request = v1::SubmitRequest { job_toml: toml.clone(), base_dir, ..Default::default() };
        match arguments[5].as_str() {
            "plan" => c.plan(request).await.map(|_| "planned".into()),
            "export" => {
                let model = Some(v1::ModelSource { source: Some(Source::Path("/m".into())) });
                c.export(v1::ExportRequest { model, path: toml, overwrite: true, ..Default::default() }).await.map(|_| "exported".into())
            }
            "generate" => {
                let begun = async {
                    let mut events = c.generate(endless()).await?;
                    events.next().await?;
                    text = Some(events);
                    Ok("generates".into())
                };
                begun.await
            }
            _ => c.submit(request).await.map(|job| job.id),
        }
        .map_err(|e| e.to_string())
    });
    println!(
        "{}",
        match said {
            Ok(id) => json!({ "ok": id }),
            Err(e) => json!({ "refused": e }),
        }
    );
    runtime.block_on(async {
        while let Some(events) = &mut text {
            if !matches!(events.next().await, Ok(Some(_))) {
                break;
            }
        }
    });
    ExitCode::SUCCESS
}

/// Text without an end.
fn endless() -> v1::GenerateRequest {
    let model = Some(v1::ModelSource { source: Some(Source::Path("/m".into())) });
    v1::GenerateRequest { model, prompts: vec!["a".into()], max_new_tokens: 1_000_000, ..Default::default() }
}

/// Two users who submit to one daemon. `None` where these tests may not become others.
struct Users {
    socket: std::path::PathBuf,
    base: String,
}

impl Users {
    fn of(bench: &mut Bench) -> Option<Users> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: only root can call as another user");
            return None;
        }
        open_to_others(bench);
        bench.settings.service.access.users = vec![UserRef::Uid(NOBODY), UserRef::Uid(DAEMON)];
        Some(Users { socket: bench.settings.socket.clone(), base: bench.dir.path().to_str().unwrap().into() })
    }

    fn submitter(&self, uid: u32, text: &str, what: &str) -> Command {
        let mut command = Command::new("/proc/self/exe");
        command.arg("submitter").arg(&self.socket).args([text, &self.base, what]);
        command.uid(uid).gid(NOBODY).current_dir("/").stdin(Stdio::null()).stderr(Stdio::inherit());
        command
    }

    /// The id of the job, or why not.
    async fn ask(&self, uid: u32, text: &str, what: &str) -> Result<String, String> {
        let mut command = self.submitter(uid, text, what);
        let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
        said(&output.stdout)
    }

    /// A call that is served until what is returned is dropped, or why it is not.
    async fn generate(&self, uid: u32) -> Result<tokio::process::Child, String> {
        let mut command = tokio::process::Command::from(self.submitter(uid, "", "generate"));
        let mut child = command.stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
        let mut line = String::new();
        let read = tokio::io::BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).await;
        assert!(read.unwrap() > 0);
        said(line.as_bytes()).map(|_| child)
    }
}

fn said(json: &[u8]) -> Result<String, String> {
    let said: Value = serde_json::from_slice(json).unwrap();
    match said["ok"].as_str() {
        Some(id) => Ok(id.into()),
        None => Err(said["refused"].as_str().unwrap().into()),
    }
}

/// Makes what a worker would have made: the daemon's, and nobody else's to write.
fn as_the_daemon(path: &Path, folder: bool) {
    if folder {
        std::fs::create_dir_all(path).unwrap();
    } else {
        std::fs::write(path, "results").unwrap();
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o750)).unwrap();
}

/// What `call` says as another user; `None` where these tests may not become one.
async fn as_user(uid: u32, socket: &Path, job: &str, own: &v1::SubmitRequest) -> Option<Value> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: only root can call as another user");
        return None;
    }
    let mut command = Command::new("/proc/self/exe");
    command.arg("caller").arg(socket).args([job, &own.job_toml, &own.base_dir]).uid(uid).gid(NOBODY).current_dir("/").stdin(Stdio::null());
    let output = tokio::task::spawn_blocking(move || command.stderr(Stdio::inherit()).output()).await.unwrap().unwrap();
    Some(serde_json::from_slice(&output.stdout).unwrap())
}

fn open_to_others(bench: &mut Bench) {
    std::fs::set_permissions(bench.dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    if let Ok(Some(group)) = nix::unistd::Group::from_gid(NOBODY.into()) {
        bench.settings.service.access.socket_group = Some(group.name);
    }
}

pub fn trials() -> Vec<Trial> {
    vec![
        trial("another_users_job_cannot_be_touched", || async {
            let mut bench = Bench::new(1, Script::endless());
            open_to_others(&mut bench);
            bench.settings.service.access.users = vec![UserRef::Uid(NOBODY)];
            let mut client = bench.up().await;
            let theirs = client.submit(bench.job("same", 100_000, "")).await.unwrap().id;
            wait_for(&mut client, &theirs, "a step", |j| j.step > 1).await;
            let own = bench.job("same", 5, "");
            let Some(seen) = as_user(NOBODY, &bench.settings.socket, &theirs, &own).await else { return bench.end().await };
            for what in ["get", "watch", "cancel", "checkpoint", "logs", "trace", "inspect", "export"] {
                let text = seen[what].as_str().unwrap();
                assert!(text.contains(&theirs) && text.contains("only that user"), "{what}: {text}");
            }
            assert!(seen["shutdown"].as_str().unwrap().contains("administrator"), "{seen}");
            assert_eq!(seen["info"], "ok");
            assert_eq!(seen["listed"], json!([[theirs, "", "", 0]]), "it is there, and nobody is told what it is");
            assert_eq!(seen["own"], json!(["ok", "ok", "ok", NOBODY]));
            let job = client.get(&theirs).await.unwrap();
            assert_eq!(job.state(), JobState::Running, "{}", job.message);
            // An administrator may look into everybody's.
            let all = client.list(true).await.unwrap();
            let other = all.iter().find(|j| j.uid == NOBODY).unwrap();
            wait_state(&mut client, &other.id.clone(), JobState::Cancelled).await;
            bench.end().await;
        }),
        trial("who_is_not_configured_is_let_in_nowhere", || async {
            let mut bench = Bench::new(1, Script::endless());
            open_to_others(&mut bench);
            bench.settings.service.access.users = vec![UserRef::Uid(NOBODY)];
            let mut client = bench.up().await;
            let theirs = client.submit(bench.job("one", 100_000, "")).await.unwrap().id;
            let own = bench.job("two", 5, "");
            if let Some(seen) = as_user(DAEMON, &bench.settings.socket, &theirs, &own).await {
                for (what, text) in seen.as_object().unwrap() {
                    assert!(text.as_str().unwrap().contains("may not use this daemon"), "{what}: {text}");
                }
                assert_eq!(client.list(true).await.unwrap().len(), 1);
            }
            bench.end().await;
        }),
        trial("paths_outside_of_the_roots_are_refused_and_named", || async {
            let mut bench = Bench::new(1, Script::quick());
            let at = |p: &str| bench.dir.path().join(p);
            std::fs::create_dir(at("data")).unwrap();
            std::fs::create_dir(at("results")).unwrap();
            std::os::unix::fs::symlink("/etc", at("data/link")).unwrap();
            bench.settings.service.paths.read = vec![at("data")];
            bench.settings.service.paths.write = vec![at("results")];
            let base = at("data").to_str().unwrap().to_string();
            let mut client = bench.up().await;
            let job = |more: &str| v1::SubmitRequest { base_dir: base.clone(), ..bench.job("one", 3, more) };
            let id = client.submit(job("[output]\nmetrics = \"../results/m\"\n")).await.unwrap().id;
            wait_state(&mut client, &id, JobState::Succeeded).await;
            let (code, text) = refused(client.submit(job("[output]\npath = \"out\"\n")).await);
            assert!(code == exit::UNREACHABLE && text.contains("output.path") && text.contains("/results"), "{code} {text}");
            let link = v1::SubmitRequest { base_dir: format!("{base}/link"), ..bench.job("one", 3, "") };
            let (_, text) = refused(client.submit(link.clone()).await);
            assert!(text.contains("/etc/m") && text.contains("/data"), "{text}");
            assert!(refused(client.plan(link).await).1.contains("/etc"));
            let model = |p: &str| Some(v1::ModelSource { source: Some(Source::Path(p.into())) });
            let inspect = |p: &str| v1::InspectRequest { model: model(p), ..Default::default() };
            assert!(refused(client.inspect(inspect("/etc")).await).1.contains("[paths]"));
            assert!(client.inspect(inspect(&format!("{base}/m"))).await.is_ok());
            // Not even the daemon's own folder, where other users' jobs are.
            let state = bench.settings.state_dir.join("jobs");
            assert!(refused(client.inspect(inspect(state.to_str().unwrap())).await).1.contains("[paths]"));
            let export = v1::ExportRequest { model: model(&base), path: format!("{base}/x"), ..Default::default() };
            assert!(refused(client.export(export).await).1.contains("/results"));
            let eval = v1::EvalRequest {
                model: model(&base),
                data_format: "text".into(),
                files: vec![format!("{base}/../*")],
                sequence_length: 4,
                ..Default::default()
            };
            assert!(refused(client.eval(eval).await).1.contains("data file"));
            let generate = v1::GenerateRequest { model: model("/m"), prompts: vec!["a".into()], max_new_tokens: 1, ..Default::default() };
            assert!(refused(client.generate(generate).await.map(|_| ())).1.contains("/m"));
            bench.end().await;
        }),
        trial("a_link_in_the_way_of_a_queued_job_is_not_followed", || async {
            let mut bench = Bench::new(1, Script::endless());
            let dir = bench.dir.path().to_path_buf();
            let (mine, theirs, own) = (dir.join("mine"), dir.join("theirs"), bench.settings.state_dir.clone());
            for folder in [&mine, &theirs] {
                std::fs::create_dir(folder).unwrap();
            }
            std::fs::write(theirs.join("metrics"), "results").unwrap();
            let mut client = bench.up().await;
            let first = client.submit(bench.job("one", 100_000, "")).await.unwrap().id;
            wait_for(&mut client, &first, "a step", |j| j.step > 1).await;
            let outputs = ["[output]\nmetrics = \"mine/metrics\"\n", "[checkpoint]\npath = \"mine/metrics\"\nkeep = 1\nevery_steps = 5\n"];
            let mut queued = Vec::new();
            for (i, more) in outputs.into_iter().enumerate() {
                let more = more.replace("mine", &format!("mine/{i}"));
                std::fs::create_dir(mine.join(i.to_string())).unwrap();
                queued.push(client.submit(bench.job("two", 5, &more)).await.unwrap().id);
            }
            // Another user's results, and a job's own file in the daemon's folder.
            for (i, target) in [theirs.clone(), own.join("jobs").join(&first)].into_iter().enumerate() {
                std::fs::remove_dir(mine.join(i.to_string())).unwrap();
                std::os::unix::fs::symlink(target, mine.join(i.to_string())).unwrap();
            }
            client.cancel(&first).await.unwrap();
            for (id, key) in queued.iter().zip(["output.metrics", "checkpoint.path"]) {
                let job = wait_state(&mut client, id, JobState::Failed).await;
                assert!(job.message.contains(key) && job.message.contains("leads to"), "{}", job.message);
                assert_eq!(job.exit_code, u32::from(exit::OUTPUT), "no restart mends that");
            }
            assert_eq!(std::fs::read_to_string(theirs.join("metrics")).unwrap(), "results");
            bench.end().await;
        }),
        trial("another_users_results_are_not_written_over", || async {
            let mut bench = Bench::new(2, Script::endless());
            let Some(users) = Users::of(&mut bench) else { return };
            let (alice, bob) = (NOBODY, DAEMON);
            bench.settings.jobs.ended_max = 1;
            let mut root = bench.up().await;
            let dir = bench.dir.path().to_path_buf();
            let at = |p: &str| dir.join(p);
            let toml = |more: &str| bench.job("same", 100_000, more).job_toml;
            let outputs = toml(
                "[output]\nmetrics = \"metrics\"\npath = \"model\"\n[checkpoint]\npath = \"checkpoints\"\nkeep = 1\nevery_steps = 5\n",
            );
            let hers = users.ask(alice, &outputs, "submit").await.unwrap();
            let others = [
                ("output.metrics", "metrics", toml("[output]\nmetrics = \"metrics\"\n")),
                ("output.path", "model", toml("[output]\npath = \"model\"\n")),
                ("checkpoint.path", "checkpoints", toml("[checkpoint]\npath = \"checkpoints\"\nkeep = 1\nevery_steps = 5\n")),
            ];
            // While her job runs nobody writes there, not even she; it does not matter whether anything is there yet.
            for (_, path, text) in &others {
                for uid in [alice, bob] {
                    let why = users.ask(uid, text, "submit").await.unwrap_err();
                    assert!(why.contains(&hers) && why.contains(at(path).to_str().unwrap()), "{uid} {path}: {why}");
                }
            }
            let inside = toml("[output]\nmetrics = \"checkpoints/step-9/m\"\n");
            assert!(users.ask(bob, &inside, "submit").await.unwrap_err().contains(&hers));
            let why = users.ask(bob, at("model").to_str().unwrap(), "export").await.unwrap_err();
            assert!(why.contains(&hers), "{why}");
            as_the_daemon(&at("metrics"), false);
            as_the_daemon(&at("model"), true);
            as_the_daemon(&at("checkpoints"), true);
            root.cancel(&hers).await.unwrap();
            wait_state(&mut root, &hers, JobState::Cancelled).await;
            // What it made stays hers, for a daemon that has forgotten the job, too: the second round.
            for round in 0..2 {
                for (what, path, text) in &others {
                    for call in ["submit", "plan"] {
                        let why = users.ask(bob, text, call).await.unwrap_err();
                        let named = why.contains(what) && why.contains(at(path).to_str().unwrap());
                        assert!(named && why.contains(&format!("user {alice}, whose job made it")), "{round} {path}: {why}");
                    }
                }
                assert!(users.ask(bob, &inside, "submit").await.unwrap_err().contains("whose job made it"));
                assert!(users.ask(bob, at("model").to_str().unwrap(), "export").await.unwrap_err().contains("whose job made it"));
                if round == 0 {
                    let short = root.submit(bench.job("short", 1, "")).await.unwrap().id;
                    wait_state(&mut root, &short, JobState::Succeeded).await;
                    bench.down().await;
                    root = bench.up().await;
                    assert!(root.get(&hers).await.is_err(), "it is forgotten");
                }
            }
            let again = users.ask(alice, &outputs, "submit").await.unwrap();
            root.cancel(&again).await.unwrap();
            wait_state(&mut root, &again, JobState::Cancelled).await;
            // Root may, but not twice at once.
            let metrics = "[output]\nmetrics = \"metrics\"\n";
            let id = root.submit(bench.job("a", 100_000, metrics)).await.unwrap().id;
            let why = root.submit(bench.job("b", 100_000, metrics)).await.unwrap_err().to_string();
            assert!(why.contains(&id) && why.contains("has not ended"), "{why}");
            root.cancel(&id).await.unwrap();
            wait_state(&mut root, &id, JobState::Cancelled).await;
            let id = root.submit(bench.job("b", 100_000, metrics)).await.unwrap().id;
            root.cancel(&id).await.unwrap();
            bench.end().await;
        }),
        trial("what_is_there_is_written_over_by_those_who_could_do_so_themselves", || async {
            let mut bench = Bench::new(1, Script::quick());
            let Some(users) = Users::of(&mut bench) else { return };
            let mut root = bench.up().await;
            let own = |p: &str, uid: u32, gid: u32, mode: u32| {
                let path = bench.dir.path().join(p);
                std::fs::write(&path, "").unwrap();
                std::os::unix::fs::chown(&path, Some(uid), Some(gid)).unwrap();
                std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            };
            own("his", DAEMON, 0, 0o600);
            own("groups", NOBODY, NOBODY, 0o664);
            own("everybodys", NOBODY, 0, 0o666);
            own("hers", NOBODY, 0, 0o664);
            own("the-daemons", 0, 0, 0o644);
            own("other-groups", 0, 12_345, 0o664);
            std::os::unix::fs::symlink("hers", bench.dir.path().join("link")).unwrap();
            for (path, allowed) in [
                ("his", true),
                ("groups", true),
                ("everybodys", true),
                ("new", true),
                ("/dev/null", true),
                ("hers", false),
                ("the-daemons", false),
                ("other-groups", false),
                ("link", false),
            ] {
                let said = users.ask(DAEMON, &bench.job("one", 2, &format!("[output]\nmetrics = \"{path}\"\n")).job_toml, "submit").await;
                assert_eq!(said.is_ok(), allowed, "{path}: {said:?}");
                if let Ok(id) = said {
                    wait_state(&mut root, &id, JobState::Succeeded).await;
                }
            }
            bench.end().await;
        }),
        trial("one_user_does_not_take_all_jobs_nor_all_calls", || async {
            let mut bench = Bench::new(1, Script::endless());
            let Some(users) = Users::of(&mut bench) else { return };
            let (alice, bob) = (NOBODY, DAEMON);
            (bench.settings.jobs.active_max, bench.settings.jobs.one_off_max) = (3, 3);
            let mut root = bench.up().await;
            let toml = bench.job("one", 100_000, "").job_toml;
            let hers = users.ask(alice, &toml, "submit").await.unwrap();
            users.ask(alice, &toml, "submit").await.unwrap();
            let why = users.ask(alice, &toml, "submit").await.unwrap_err();
            assert!(why.contains("jobs.active_max_per_user") && why.contains("2 jobs of user 65534"), "{why}");
            users.ask(bob, &toml, "submit").await.unwrap();
            let why = users.ask(bob, &toml, "submit").await.unwrap_err();
            assert!(why.contains("(jobs.active_max)"), "{why}");
            assert_eq!(root.list(true).await.unwrap().len(), 3, "what is refused leaves nothing");
            // Root comes in all the same, and what ends makes room for its user.
            root.submit(bench.job("root", 100_000, "")).await.unwrap();
            assert!(users.ask(alice, &toml, "submit").await.unwrap_err().contains("_per_user"));
            for job in root.list(false).await.unwrap().into_iter().filter(|j| j.uid != bob) {
                root.cancel(&job.id).await.unwrap();
                wait_state(&mut root, &job.id, JobState::Cancelled).await;
            }
            assert_ne!(users.ask(alice, &toml, "submit").await.unwrap(), hers);

            let first = users.generate(alice).await.unwrap();
            let second = users.generate(alice).await.unwrap();
            for what in ["generate", "plan"] {
                let why = users.ask(alice, &toml, what).await.unwrap_err();
                assert!(why.contains("jobs.one_off_max_per_user") && why.contains("user 65534"), "{what}: {why}");
            }
            let _his = users.generate(bob).await.unwrap();
            let why = users.generate(bob).await.unwrap_err();
            assert!(why.contains("(jobs.one_off_max)"), "{why}");
            assert!(root.plan(bench.job("two", 5, "")).await.is_ok(), "root comes in all the same");
            drop((first, second));
            // Once the daemon has seen that she has gone away.
            let end = std::time::Instant::now() + crate::bench::LIMIT;
            while let Err(why) = users.generate(alice).await {
                assert!(std::time::Instant::now() < end, "{why}");
            }
            bench.end().await;
        }),
        trial("one_who_runs_wild_is_slowed_down", || async {
            let mut bench = Bench::new(1, Script::endless());
            let limits = LimitsConfig { calls_per_second: 0.001, calls_burst: 20, open_calls_per_user: 3, ..Default::default() };
            bench.settings.service.limits = limits;
            let mut client = bench.up().await;
            let id = client.submit(bench.job("one", 100_000, "")).await.unwrap().id;
            let mut watchers = vec![];
            for _ in 0..3 {
                watchers.push(client.watch(&id, 0).await.unwrap());
            }
            let (code, text) = refused(client.get(&id).await);
            assert!(code == exit::RESOURCES && text.contains("open_calls_per_user"), "{code} {text}");
            drop(watchers);
            let mut answers = vec![];
            for _ in 0..40 {
                answers.push(client.get(&id).await.map_err(|e| e.to_string()));
            }
            assert!(answers.iter().any(Result::is_ok));
            assert!(answers.last().unwrap().as_ref().unwrap_err().contains("calls_per_second"), "{answers:?}");
            let large = v1::SubmitRequest { job_toml: "#".repeat(20 << 20), ..bench.job("x", 1, "") };
            assert!(client.submit(large).await.is_err());
            // No call is left to ask with whether it trains already.
            let history = bench.settings.state_dir.join("jobs").join(&id).join("metrics.jsonl");
            let end = std::time::Instant::now() + crate::bench::LIMIT;
            while !std::fs::metadata(&history).is_ok_and(|m| m.len() > 0) {
                assert!(std::time::Instant::now() < end, "no step was committed");
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
            // No call is left to cancel with: what trains keeps its segment for the next daemon.
            bench.down().await;
            bench.assert_kept(1);
        }),
    ]
}
