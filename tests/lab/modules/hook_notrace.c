// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The benign hook of hook_procroot.c, whose own function is hidden from Ftrace:
 * it leaves no record of itself, as the functions of newer rootkits do not.
 */
#define VISIBILITY notrace
#include "hook_procroot.c"
