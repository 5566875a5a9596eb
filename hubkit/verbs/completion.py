"""`completion`: the script by which a shell asks hubkit what a word could become."""

from __future__ import annotations

from dataclasses import dataclass

from hubkit.documents.arguments import checked
from hubkit.documents.shown import Shown
from hubkit.errors import USAGE, HubkitError, nearest

BASH = r"""_hubkit_completion() {
    local line=${COMP_LINE:0:COMP_POINT} kind value help prefix="" i
    local word=${line##*[[:space:]]}
    # bash replaces what is behind the last of these characters alone
    for ((i = ${#word} - 1; i >= 0; i--)); do
        if [[ $COMP_WORDBREAKS == *"${word:i:1}"* ]]; then prefix=${word:0:i+1}; break; fi
    done
    COMPREPLY=()
    while IFS=$'\t' read -r kind value help; do
        case $kind in
            plain) COMPREPLY+=("${value#"$prefix"}") ;;
            dir) compopt -o dirnames 2>/dev/null ;;
            file) compopt -o default 2>/dev/null ;;
        esac
    done < <(COMP_WORDS=$line _HUBKIT_COMPLETE=bash_complete "$1" 2>/dev/null)
}
complete -F _hubkit_completion hubkit
"""
ZSH = r"""#compdef hubkit
_hubkit_completion() {
    local kind value help
    local -a found
    while IFS=$'\t' read -r kind value help; do
        case $kind in
            plain) found+=("$value") ;;
            dir) _path_files -/ ;;
            file) _path_files -f ;;
        esac
    done < <(COMP_WORDS="${(j: :)words[1,CURRENT]}" _HUBKIT_COMPLETE=zsh_complete "$words[1]" 2>/dev/null)
    (( $#found )) && compadd -Q -- "${found[@]}"
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _hubkit_completion "$@"
else
    compdef _hubkit_completion hubkit
fi
"""
FISH = r"""function __hubkit_completion
    set -lx COMP_WORDS (commandline -cp)
    set -lx _HUBKIT_COMPLETE fish_complete
    for line in (hubkit 2>/dev/null)
        set -l parts (string split \t -- $line)
        switch $parts[1]
            case dir
                __fish_complete_directories (commandline -ct)
            case file
                __fish_complete_path (commandline -ct)
            case plain
                printf '%s\t%s\n' $parts[2] $parts[3]
        end
    end
end
complete --no-files --command hubkit --arguments '(__hubkit_completion)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
"""Shell -> script. It gives the line up to the cursor in ``COMP_WORDS`` and reads lines of kind, value and help, tabs
between them: ``plain``, or ``dir`` and ``file`` for what the shell finds itself."""


@dataclass(frozen=True, repr=False)
class Completion(Shown):
    """A script for a shell.

    Args:
        shell: which.
        script: its text.
    """

    shell: str
    script: str


@checked
def completion(shell: str) -> Completion:
    """The script that makes a shell complete commands, options, methods, engines and references.

    Args:
        shell: ``bash``, ``zsh`` or ``fish``.

    Raises:
        HubkitError: ``HK-OPTIONS`` (status 2) for another shell.
    """
    if shell not in SCRIPTS:
        near = nearest(shell, SCRIPTS, 1)
        fix = f"hubkit completion {near[0]}" if near else ""
        want = ", ".join(SCRIPTS)
        raise HubkitError("HK-OPTIONS", "no such shell", want=want, have=shell[:80], fix=fix, status=USAGE)
    return Completion(shell, SCRIPTS[shell])
