// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A module for the lab's guest that takes itself off the kernel's list, as
 * rootkits do first of all. It does nothing else, and stays until the guest
 * ends: nobody finds it who could unload it.
 */
#include "hook.h"

static int __init hook_init(void)
{
	struct mutex *lock = hook_find("module_mutex");

	if (!lock)
		return -ENOENT;
	mutex_lock(lock);
	list_del_init(&THIS_MODULE->list);
	mutex_unlock(lock);
	return 0;
}

module_init(hook_init);
MODULE_DESCRIPTION("Lab: a module that is on no list");
MODULE_LICENSE("GPL");
