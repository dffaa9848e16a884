//! Points that are damaged: what can still be restored, and dropping the rest.

use super::*;

/// A machine with a qcow2 disk, whose points are increments.
struct Chain {
    place: Place,
    vm: Vm,
}

impl Chain {
    fn new() -> Self {
        let place = Place::new();
        let mut disk = Command::new("qemu-img");
        disk.args(["create", "-q", "-f", "qcow2", "-o", "size=4M"]).arg(place.path("disk.qcow2"));
        assert!(disk.status().unwrap().success());
        let drive = format!("if=none,id=drive,file={},format=qcow2", place.text("disk.qcow2"));
        let vm = place.qemu(&["-drive", &drive, "-device", "virtio-blk-pci,id=vda,drive=drive"]);
        Self { place, vm }
    }

    /// A point after the guest wrote `value` at `at` KiB; its id.
    fn point(&mut self, value: u8, at: u32, more: &[&str]) -> String {
        let line =
            format!("qemu-io -d /machine/peripheral/vda/virtio-backend \"write -P {value} {at}k 64k\"");
        let said = self.vm.own.execute("human-monitor-command", json!({"command-line": line})).unwrap();
        assert!(!said.as_str().unwrap().contains("rror"), "{said}");
        let line = ["backup", "box", "--qmp", "@qmp", "--to", "@target", "--json"];
        let summary = self.place.run(&[&line[..], more].concat()).json().unwrap();
        summary["point"].as_str().unwrap().strip_prefix("box/").unwrap().to_owned()
    }

    fn ids(&self) -> Vec<String> {
        let listed = self.place.run(&["points", "--to", "@target", "--json"]).json().unwrap();
        listed.as_array().unwrap().iter().map(|point| point["id"].as_str().unwrap().to_owned()).collect()
    }
}

#[test]
fn a_chain_with_a_removed_point_is_told_of_and_dropped() {
    let mut chain = Chain::new();
    let first = chain.point(1, 0, &[]);
    let second = chain.point(2, 64, &[]);
    let third = chain.point(3, 128, &[]);
    fs::remove_dir_all(chain.place.path(&format!("target/box/{second}"))).unwrap();

    let forget = ["forget", "--damaged", "--to", "@target"];
    let verified = chain.place.run(&["verify", "--to", "@target"]);
    let latest =
        format!("box: 1 of 2 points can be restored, the latest is box/{first}; what is newer is damaged");
    says(
        &verified,
        1,
        &[
            &format!("box/{third}  DAMAGED"),
            &latest,
            "next:   make a new full point now: stillpoint backup box --full",
        ],
    );
    let doctor = chain.place.run(&["doctor", "--qmp", "@qmp", "--to", "@target"]);
    says(&doctor, 1, &["WRONG", &third, "next: stillpoint backup box --full --to"]);

    // Once that is done, nothing else asks for it.
    let fourth = chain.point(4, 192, &["--full"]);
    let verified = chain.place.run(&["verify", "--to", "@target"]);
    let latest = format!(
        "box: 2 of 3 points can be restored, the latest is box/{fourth}, newer than all that is damaged"
    );
    says(&verified, 1, &[&latest, "stillpoint forget --damaged --to"]);
    assert!(!verified.stderr.contains("--full"), "{verified:?}");
    let verified = chain.place.run(&["verify", "--to", "@target", "--json"]);
    let json: Value = serde_json::from_str(&verified.stdout).unwrap();
    assert_eq!(json["latest_good"], json!({"box": fourth}));
    let doctor = chain.place.run(&["doctor", "--qmp", "@qmp", "--to", "@target"]);
    says(&doctor, 1, &["2 points that look good", "next: stillpoint forget box --damaged --to"]);
    // One by itself says the same.
    let verified = chain.place.run(&["verify", &third, "--to", "@target"]);
    says(
        &verified,
        1,
        &["2 of 3 points can be restored (2 of them not verified now)", "stillpoint forget --damaged"],
    );

    let dry = chain.place.run(&[&forget[..], &["--dry-run"]].concat());
    says(
        &dry,
        0,
        &[
            &format!("box/{third}  damaged, would be dropped"),
            &format!("box/{first}  good"),
            "1 points would be dropped, 2 kept, 2 of them good",
        ],
    );
    assert_eq!(chain.ids(), [first.as_str(), &third, &fourth]);
    let done = chain.place.run(&[&forget[..], &["--json"]].concat()).json().unwrap();
    assert_eq!(done["forgotten"], 1);
    assert_eq!(chain.ids(), [first.as_str(), &fourth]);
    says(&chain.place.run(&["verify", "--to", "@target"]), 0, &["2 good, 0 damaged"]);
    says(&chain.place.run(&["doctor", "--qmp", "@qmp", "--to", "@target"]), 0, &["everything is in place"]);
    // The chain goes on from the full one.
    let fifth = chain.point(5, 256, &[]);
    let restored = chain.place.run(&["restore", &fifth, "--to", "@target", "--output", "@out"]);
    says(&restored, 0, &[&format!("restored box/{fifth}")]);
    let bytes = fs::read(chain.place.path("out/vda.raw")).unwrap();
    let values: Vec<u8> = (0..6).map(|at| bytes[at * 65_536]).collect();
    assert_eq!(values, [1, 2, 3, 4, 5, 0]);
}

#[test]
fn a_point_that_a_good_one_needs_is_kept() {
    let mut chain = Chain::new();
    let first = chain.point(1, 0, &[]);
    // All that is damaged below is written again.
    let second = chain.point(2, 0, &[]);
    let image = chain.place.path(&format!("target/box/{first}/vda.raw"));
    let mut bytes = fs::read(&image).unwrap();
    bytes[100] ^= 1;
    fs::write(&image, bytes).unwrap();
    let told = chain.place.run(&["forget", "--damaged", "--to", "@target"]);
    says(
        &told,
        0,
        &[&format!("box/{first}  damaged, kept: box/{second} is restored from it"), "0 points dropped"],
    );
    let verified = chain.place.run(&["verify", &format!("box/{second}"), "--to", "@target"]);
    says(&verified, 1, &["DAMAGED", "can be restored all the same: --disk vda"]);
    says(
        &chain.place.run(&["restore", "box/latest", "--to", "@target", "--output", "@out"]),
        0,
        &["restored"],
    );
    says(&chain.place.run(&["restore", &first, "--to", "@target", "--output", "@out-1"]), 1, &["vda.raw"]);
}

#[test]
fn what_forget_does_not_do_to_a_directory_it_says() {
    let mut chain = Chain::new();
    let point = chain.point(1, 0, &[]);
    for rule in [&["--keep-last", "1"][..], &["--keep-daily", "7", "--dry-run"]] {
        let outcome = chain.place.run(&[&["forget", "--to", "@target"], rule].concat());
        says(
            &outcome,
            2,
            &["forgets none by rules", "next:   to drop damaged points: stillpoint forget --damaged --to"],
        );
    }
    for bad in [&["--damaged", "--keep-last", "1"][..], &["--damaged=some"], &[]] {
        assert_eq!(chain.place.run(&[&["forget", "--to", "@target"], bad].concat()).status, 2);
    }
    says(
        &chain.place.run(&["forget", "--damaged=any", "--to", "@target"]),
        0,
        &["0 points dropped, 1 kept, 1 of them good"],
    );
    says(
        &chain.place.run(&["forget", "other", "--damaged", "--to", "@target"]),
        0,
        &["0 points dropped, 0 kept"],
    );
    assert_eq!(chain.ids(), [point]);
}

#[test]
fn dropping_is_interrupted_anywhere() {
    let mut chain = Chain::new();
    let ids: Vec<_> = (1..=3).map(|value| chain.point(value, 64 * u32::from(value), &[])).collect();
    let good = chain.point(9, 0, &["--full"]);
    fs::remove_file(chain.place.path(&format!("target/box/{}/vda.raw", ids[0]))).unwrap();
    let line = chain.place.arguments(&["forget", "--damaged", "--to", "@target"]);
    let mut command = chain.place.tool.command(&line);
    let killed =
        command.env("STILLPOINT_FAILPOINT", "point-dropped#1=kill").stderr(Stdio::null()).status().unwrap();
    assert!(!killed.success());
    // The first of them is half gone, and nothing that was good is.
    assert_eq!(chain.ids().len(), 3);
    says(&chain.place.run(&["verify", "box/latest", "--to", "@target"]), 0, &["1 good"]);
    says(
        &chain.place.run(&["forget", "--damaged", "--to", "@target"]),
        0,
        &["2 points dropped, 1 kept, 1 of them good"],
    );
    assert_eq!(chain.ids(), [good]);
    let left = fs::read_dir(chain.place.path("target/box")).unwrap();
    let mut left: Vec<_> = left.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    left.sort();
    assert_eq!(left.len(), 2, "{left:?}");
}
