
# Domains, as libvirt names them, where a command wants one; all else as above.
_xftrace_domains() {
    local word uri=${LIBVIRT_DEFAULT_URI:-qemu:///system} name i
    for ((i = 1; i < COMP_CWORD - 1; i++)); do
        case ${COMP_WORDS[i]} in
        -c | --connect)
            word=${COMP_WORDS[i + 1]}
            # readline splits a URI at its colons.
            for ((i += 2; i < COMP_CWORD; i++)); do
                [[ ${COMP_WORDS[i]} == : || ${COMP_WORDS[i - 1]} == : ]] || break
                word+=${COMP_WORDS[i]}
            done
            uri=$word
            ;;
        esac
    done
    COMPREPLY=()
    # Each name is quoted, never expanded: who makes domains chooses it.
    while IFS= read -r name; do
        [[ -n $name && $name == "$1"* ]] && COMPREPLY+=("$(printf '%q' "$name")")
    done < <(virsh --readonly --quiet --connect "$uri" list --all --name 2>/dev/null)
}

_xftrace_or_domain() {
    local cur=$2 previous=$3 command='' word skip=''
    case $previous in
    @DOMAIN_OPTIONS@)
        _xftrace_domains "$cur"
        return
        ;;
    @VALUE_OPTIONS@)
        _xftrace "$@"
        return
        ;;
    esac
    # The command is the first word that is neither an option nor its value.
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        if [[ -n $skip ]]; then
            skip=''
            continue
        fi
        case $word in
        @DOMAIN_OPTIONS@ | @VALUE_OPTIONS@) skip=1 ;;
        -* | : | */*) ;;
        *)
            command=$word
            break
            ;;
        esac
    done
    case $command in
    @DOMAIN_COMMANDS@)
        if [[ $cur != -* ]]; then
            _xftrace_domains "$cur"
            return
        fi
        ;;
    esac
    _xftrace "$@"
}

complete -F _xftrace_or_domain -o nosort -o bashdefault -o default xftrace
