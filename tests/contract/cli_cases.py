"""What every `tinker` command is run with, and what it must print; in table and in JSON form.

`{run}`, `{session}`, `{state}` and `{spare}` in arguments stand for what the test has made (`{spare}`: a published
checkpoint of the command's and the form's own), `{form}` for the form, `{out}` for a folder, `{begin}` and `{end}` for
hours before and after the test.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """`told` must be in what is printed, in either form; `keys` are of the JSON object, if the command prints one."""

    arguments: str = ""
    told: str = ""
    keys: tuple[str, ...] = ()
    note: str = ""
    written: tuple[str, ...] = ()  # files that must be there afterwards
    typed: str = ""


COMMANDS = {
    "version": Command(told="0.38"),
    "auth login": Command(told="Logged in as", typed="tml-typed\n", note="any key of the server's"),
    "auth status": Command(told="accessible: yes"),
    "auth whoami": Command(told="tml:organization:tinsmith", keys=("user_urn", "org_urn")),
    "auth logout": Command(told="Removed credential"),
    "billing usage": Command("{begin} {end}", "training", ("data", "sessions"), note="prices are settings"),
    "billing checkpoint-storage": Command("--project-id {project}", "{project}", ("data",)),
    "checkpoint list": Command("--run-id {run}", "{state}", ("checkpoints",)),
    "checkpoint info": Command("{state}", "{run}"),
    "checkpoint publish": Command("{spare}"),
    "checkpoint unpublish": Command("{spare}"),
    "checkpoint set-ttl": Command("{spare} --ttl 7200"),
    "checkpoint delete": Command("{spare} --yes"),
    "checkpoint download": Command(
        "{state} -o {out}/{form}", written=("adapter_model.safetensors", "adapter_config.json")
    ),
    "checkpoint push-hf": Command(
        "{state} --repo anna/{form}", "anna/{form}", note="tried against a stand-in for the hub"
    ),
    "model list": Command(told="tiny", keys=("models",)),
    "run list": Command(told="{run}", keys=("runs",)),
    "run info": Command("{run}", "{run}"),
    "session export-trace": Command(
        "{session} -o {out}/{form}.pftrace",
        "{session}",
        written=("{form}.pftrace",),
        note="in the JSON form that Perfetto reads",
    ),
}

NOTES = {command: case.note for command, case in COMMANDS.items()}
